"""Shapes of the results of kernels."""

from typing import Any

import jax
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike


def result(shape: tuple[int, ...], dtype: DTypeLike, inputs: Any) -> jax.ShapeDtypeStruct:
    """The shape of a result that varies over the axes of a `shard_map` over which an input varies."""
    axes = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(inputs)]
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=frozenset().union(*axes)))
