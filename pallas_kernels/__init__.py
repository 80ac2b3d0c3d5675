"""The packed SpQR format and the operations on it."""


class SpqrTensor: ...


def spqr_matmul(x, w):
    raise NotImplementedError
