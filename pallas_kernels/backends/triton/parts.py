"""Launches whose programs have different tasks."""

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array

Part = Callable[[Array], None]
"""The task of some programs, as a function of a program's number within the part."""


def first_and_rest(count: int, first: Part, rest: Part | None) -> None:
    """Runs one part in the first `count` programs of the grid's first axis, and the other in the rest.

    Call `pl.program_id` for other axes before: interpreted kernels cannot call it in branches.
    """
    number = pl.program_id(0)
    if rest is None:
        return first(number)
    jax.lax.cond(number < count, lambda: first(number), lambda: rest(number - count))
