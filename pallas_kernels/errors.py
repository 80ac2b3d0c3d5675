"""The base class of all errors that a user can cause."""


class SpqrError(ValueError):
    """An input that cannot be used; the message is one sentence with the fault, its numbers and the remedy."""
