"""The operations on packed matrices as Pallas kernels in Triton, for NVIDIA GPUs from compute capability 8.0 on.

All that touches Pallas's Triton backend is in this package, so that another backend can take its place.
"""

from pallas_kernels.backends.triton.matmul import matmul

__all__ = ["matmul"]
