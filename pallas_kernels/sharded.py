"""A packed matrix split over the devices of a mesh, its product, and its rows."""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, UInt16

from pallas_kernels.backends.table import Implementation
from pallas_kernels.dequantize import spqr_take
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.matmul import spqr_matmul

By = Literal["rows", "columns"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitTensor:
    """A weight `[out, in]`, packed and split by rows or by columns over the devices of a mesh.

    Attributes:
      parts: the result of `split_rows` or `split_columns`, its axis of parts along the mesh.
      features: input features of each part of columns, from `split_columns`, along the mesh; None for rows.
      by: the axis that is split.
      mesh: the devices, along one axis.

    Example:
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> along_mesh = jax.NamedSharding(mesh, jax.P("model"))
      >>> w = SplitTensor(*jax.device_put(split_columns(packed, mesh.size), along_mesh), by="columns", mesh=mesh)
      >>> w = SplitTensor(jax.device_put(split_rows(packed, mesh.size), along_mesh), None, by="rows", mesh=mesh)
      >>> w.shape == packed.shape
      True
    """

    parts: SpqrTensor
    features: UInt16[Array | np.ndarray, "*stack parts part_columns"] | None
    by: By = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.parts.shape
        return (out * self.mesh.size, columns) if self.by == "rows" else (out, columns * self.mesh.size)


def split_matmul(
    x: Float[Array, "*batch in"], w: SplitTensor, *, implementation: Implementation | None = None
) -> Float[Array, "*batch out"]:
    """y = x ŵᵀ, where each device multiplies with its part of the weight by `spqr_matmul`.

    By rows, every device takes all of x, and y stays sharded, its last axis along the mesh. By columns, every device
    takes its own features, and the results are summed over the devices in x's type. Without a permutation these are the
    features that a product by rows leaves on the device.

    Args:
      x: activations.
      w: the packed weight.
      implementation: as for `spqr_matmul`.

    Raises:
      SpqrError: as `spqr_matmul`.

    Example:
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> up = SplitTensor(split_rows(packed, 1), None, by="rows", mesh=mesh)
      >>> down = SplitTensor(*split_columns(packed, 1), by="columns", mesh=mesh)
      >>> mlp = jax.jit(lambda x: split_matmul(jax.nn.silu(split_matmul(x, up)), down))  # one sum over the devices
      >>> mlp(x).shape
      (256, 64)
    """
    if x.shape[-1] != w.shape[1]:
        raise SpqrError(f"x has {x.shape[-1]} features, but the weight of shape {w.shape} takes {w.shape[1]}")
    (axis,) = w.mesh.axis_names
    whole, last = P(), P(*[None] * (x.ndim - 1), axis)

    def local(x: Array, w: SplitTensor) -> Array:
        own = jax.tree.map(lambda array: array[0], w)
        x = x if own.features is None else x[..., own.features]
        y = spqr_matmul(x, own.parts, implementation=implementation)
        return y if w.by == "rows" else jax.lax.psum(y, axis)

    x_spec = last if w.by == "columns" and w.features is None else whole
    y_spec = last if w.by == "rows" else whole
    if w.mesh.are_all_axes_explicit:
        x = jax.reshard(x, NamedSharding(w.mesh, x_spec))
    # JAX's interpreter of kernels does not track which values vary between devices.
    checked = implementation != "interpret"
    return jax.shard_map(local, mesh=w.mesh, in_specs=(x_spec, P(axis)), out_specs=y_spec, check_vma=checked)(x, w)


def split_take(
    w: SplitTensor, rows: Integer[Array | np.ndarray, "*batch"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch in"]:
    """Rows of a weight that is split by rows: `spqr_take` on the device that has a row, summed over the devices.

    Example:
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> w = SplitTensor(split_rows(packed, 1), None, by="rows", mesh=mesh)
      >>> bool((split_take(w, jnp.array([3, 0])) == spqr_take(packed, jnp.array([3, 0]))).all())
      True
    """
    (axis,) = w.mesh.axis_names

    def local(rows: Array, w: SplitTensor) -> Array:
        part = jax.tree.map(lambda array: array[0], w.parts)
        count = part.shape[0]
        own = rows - jax.lax.axis_index(axis) * count
        found = spqr_take(part, jnp.clip(own, 0, count - 1), dtype)
        return jax.lax.psum(jnp.where(((own >= 0) & (own < count))[..., None], found, 0), axis)

    indices = jnp.asarray(rows, jnp.int32)
    if w.mesh.are_all_axes_explicit:
        indices = jax.reshard(indices, NamedSharding(w.mesh, P()))
    return jax.shard_map(local, mesh=w.mesh, in_specs=(P(), P(axis)), out_specs=P())(indices, w)
