"""Computing as without `JAX_ENABLE_X64`, which a program may have set for its own computations in float64."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def in_32_bits(function: Callable[P, T]) -> Callable[P, T]:
    """A function in which JAX makes arrays of at most 32 bits, so that its results do not depend on the setting.

    Example:
      >>> in_32_bits(lambda: jnp.arange(3).dtype)()
      dtype('int32')
    """

    @wraps(function)
    def limited(*args: P.args, **options: P.kwargs) -> T:
        with jax.enable_x64(False):
            return function(*args, **options)

    return limited


def steps_in_32_bits(function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """`in_32_bits` for a function that returns an iterator: the setting is the caller's again between two steps."""

    @wraps(function)
    def limited(*args: P.args, **options: P.kwargs) -> Iterator[T]:
        with jax.enable_x64(False):
            steps = iter(function(*args, **options))
        return _limited_steps(steps)

    return limited


def _limited_steps(steps: Iterator[T]) -> Iterator[T]:
    while True:
        with jax.enable_x64(False):
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step
