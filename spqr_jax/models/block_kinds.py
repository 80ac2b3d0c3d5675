"""Stacked blocks of several kinds, as when some matrices are packed in other formats."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockKinds:
    """Blocks whose parameters differ in structure or shapes: a stack for each kind.

    Attributes:
      stacks: the stacked parameters of each kind.
      kinds: for each block its kind.
      places: for each block its place in the stack of its kind.
    """

    stacks: tuple[Any, ...]
    kinds: tuple[int, ...] = field(metadata={"static": True})
    places: tuple[int, ...] = field(metadata={"static": True})

    def indices(self) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
        """Kind and place of each block."""
        return jnp.array(self.kinds), jnp.array(self.places)
