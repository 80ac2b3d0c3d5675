"""Where work runs: the devices of a mesh, which may belong to several processes that run the same program.

Quantization splits sequences and rows, and nothing by two axes of a mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

AXIS = "devices"

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]


@dataclass(frozen=True)
class Placement:
    """The devices that share the work, and the memory that keeps hidden states.

    A placement can be a static argument of `jax.jit`. Placements on the same devices are equal, so that each program is
    compiled once for them.

    Attributes:
      mesh: the devices, along one axis whatever axes were given; None for the default device.
      allocate: `allocate(shape, dtype)` makes the host arrays that hold hidden states.

    Example:
      >>> placement = Placement(jax.make_mesh((1,), ("data",)))
      >>> placement.shares, placement.along(0).spec
      (1, P('devices',))
      >>> Placement(allocate=np.zeros) == Placement()
      True
    """

    mesh: Mesh | None = None
    allocate: Allocate = field(default=np.empty, compare=False)

    def __post_init__(self) -> None:
        if self.mesh is not None:
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices.reshape(-1), AXIS))

    @property
    def shares(self) -> int:
        """Number of devices that share the work."""
        return 1 if self.mesh is None else self.mesh.size

    def along(self, axis: int | None) -> NamedSharding | None:
        """The sharding of an array that is cut along an axis, or (None) copied to every device."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, P() if axis is None else P(*[None] * axis, AXIS))

    def put(self, array: Shaped[Array | np.ndarray, "*shape"], axis: int | None) -> Shaped[Array, "*shape"]:
        """Moves an array to the devices, cut along an axis or (None) whole; every process gives the same values."""
        sharding = self.along(axis)
        if isinstance(array, jax.Array) or sharding is None:
            return jax.device_put(array, sharding)
        # Each device reads its own part, so that none holds the whole array.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def put_parameter(self, leaf: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        """Moves a parameter to the devices in float32; a kernel whose output features divide is cut along them."""
        if self.mesh is None:
            return jnp.asarray(leaf, jnp.float32)
        axis = 1 if leaf.ndim == 2 and leaf.shape[1] % self.shares == 0 else None
        return self.put(leaf.astype(np.float32), axis)

    def gather(self, tree: Any) -> Any:
        """Copies the arrays of a tree to every device; call it inside a jitted function."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self.along(None))

    def by_rows(self, function: Callable[..., Any], rows: Any, *shared: Any, unit: int = 1) -> Any:
        """Computes `function(rows, *shared)`, each device on its own rows of the matrices in `rows`.

        Args:
          function: its results are concatenated along their first axes.
          rows: tree of matrices; rows of zeros are appended where they do not divide.
          shared: trees that every device has whole.
          unit: each device gets a multiple of this number of rows of each matrix.
        """
        if self.mesh is None:
            return function(rows, *shared)
        padded = jax.tree.map(lambda m: jnp.pad(m, ((0, -len(m) % (unit * self.shares)), (0, 0))), rows)
        specs = P(AXIS), *[P()] * len(shared)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=P(AXIS))(padded, *shared)


ONE_DEVICE = Placement()
"""The default device, hidden states in memory."""


def to_host(array: Shaped[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Copies a whole array into this process's memory, on whichever devices its parts are."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
