"""The operations on packed matrices as Pallas kernels in Triton, for NVIDIA GPUs from compute capability 8.0 on.

Nothing outside of this package uses Pallas's Triton backend, which JAX deprecates since 0.11.
"""

from pallas_kernels.backends.triton.backend import INTERPRET, PALLAS

__all__ = ["INTERPRET", "PALLAS"]
