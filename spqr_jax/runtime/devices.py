"""Arrays shared by the devices of a mesh, which may belong to several processes that run the same program.

Quantization splits sequences and rows, and nothing by two axes of a mesh: see `flat`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

AXIS = "devices"


def flat(mesh: Mesh | None) -> Mesh | None:
    """The devices of a mesh along one axis, whatever axes it has, and of whichever type."""
    return mesh and Mesh(mesh.devices.reshape(-1), AXIS)


def shares(mesh: Mesh | None) -> int:
    """Number of devices that share the work."""
    return 1 if mesh is None else mesh.size


def along(mesh: Mesh | None, axis: int | None) -> NamedSharding | None:
    """Where the parts of an array are that is cut along an axis, or of one (None) that every device has a copy of."""
    if mesh is None:
        return None
    return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, AXIS))


def put(array: Shaped[Any, "..."], sharding: NamedSharding | None) -> Shaped[Array, "..."]:
    """The array on devices, each of which gets its part and no more; every process gives the same values."""
    if isinstance(array, jax.Array) or sharding is None:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather(tree: Any, mesh: Mesh | None) -> Any:
    """Inside a jitted function: the arrays of a tree, of which every device gets a copy."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, along(mesh, None))


def by_rows(function: Callable[..., Any], mesh: Mesh | None, rows: Any, *shared: Any, unit: int = 1) -> Any:
    """`function(rows, *shared)` with each device at work on its own rows of the matrices in `rows`.

    Args:
      function: what it returns is put together along first axes.
      mesh: the devices; None calls the function as it is.
      rows: tree of matrices; rows of zeros are appended where they do not divide.
      shared: trees of what every device has.
      unit: each device gets a multiple of so many rows of each matrix.
    """
    if mesh is None:
        return function(rows, *shared)
    padded = jax.tree.map(lambda m: jnp.pad(m, ((0, -len(m) % (unit * mesh.size)), (0, 0))), rows)
    specs = P(AXIS), *[P()] * len(shared)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(AXIS))(padded, *shared)


def to_host(array: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """All of an array in this process's memory, wherever its parts are."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
