"""LAPACK on CPUs, whose threads get in the way of XLA's."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import jax
from threadpoolctl import ThreadpoolController

T = TypeVar("T")


def in_one_thread(program: Callable[..., T], *args: object) -> T:
    """`program(*args)`, finished, where each call of LAPACK keeps to one thread.

    OpenBLAS, which factorizes for JAX, otherwise has threads that go on for some 30 ms after each call, looking for
    more to do, and take a core each from what XLA computes meanwhile. The programs of quantization that factorize do
    little else in LAPACK.

    Example:
      >>> factor = in_one_thread(factorize, hessian, config)
    """
    with _libraries().limit(limits=1, user_api="blas"):
        return jax.block_until_ready(program(*args))


@cache
def _libraries() -> ThreadpoolController:
    # JAX takes LAPACK from SciPy, and only those libraries are found that are in memory.
    import scipy.linalg.cython_lapack  # noqa: F401

    return ThreadpoolController()
