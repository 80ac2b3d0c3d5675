"""LAPACK on CPUs, whose threads compete with XLA's."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import jax
from threadpoolctl import ThreadpoolController

T = TypeVar("T")


def in_one_thread(program: Callable[..., T], *args: object) -> T:
    """Runs `program(*args)` to its end with each call of LAPACK in one thread.

    JAX factorizes with OpenBLAS, whose other threads spin for some 30 ms after each call. Meanwhile each takes a core
    from XLA: a 1536 × 576 matrix took 82 ms to quantize on two cores instead of 51. The programs of quantization that
    factorize do little else in LAPACK.

    Example:
      >>> factor = in_one_thread(jnp.linalg.cholesky, hessian)
    """
    with _libraries().limit(limits=1, user_api="blas"):
        return jax.block_until_ready(program(*args))


@cache
def _libraries() -> ThreadpoolController:
    # The controller finds only libraries that are loaded, and JAX takes LAPACK from SciPy.
    import scipy.linalg.cython_lapack  # noqa: F401

    return ThreadpoolController()
