"""Programs of one launch that do different things."""

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array

Part = Callable[[Array], None]
"""What programs do, given the number of a program among those of the part."""


def first_and_rest(count: int, first: Part, rest: Part | None) -> None:
    """The first `count` programs of the grid's first axis run one part, those after them, if any, the other.

    What else a part needs of `pl.program_id` is to be asked before: interpreted, branches cannot.
    """
    number = pl.program_id(0)
    if rest is None:
        return first(number)
    jax.lax.cond(number < count, lambda: first(number), lambda: rest(number - count))
