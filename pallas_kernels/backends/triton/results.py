"""Shapes of what a kernel writes."""

from typing import Any

import jax
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike


def result(shape: tuple[int, ...], dtype: DTypeLike, inputs: Any) -> jax.ShapeDtypeStruct:
    """A result that differs between the devices of a `shard_map` wherever an input does."""
    axes = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(inputs)]
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=frozenset().union(*axes)))
