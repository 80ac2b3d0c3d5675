"""A packed matrix of which every device of a mesh has a part, and its product."""

from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt16

from pallas_kernels.backends.table import Implementation
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.matmul import spqr_matmul

By = Literal["rows", "columns"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitTensor:
    """A weight `[out, in]`, packed and split by rows or by columns over the devices of a mesh.

    Attributes:
      parts: what `split_rows` or `split_columns` gave, its axis of parts along the mesh.
      features: input features of each part of columns, as `split_columns` gave them, along the mesh; None otherwise.
      by: what was split.
      mesh: the devices, along one axis.

    Example:
      >>> over = NamedSharding(mesh, P("model"))
      >>> w = SplitTensor(*jax.device_put(split_columns(packed, mesh.size), over), by="columns", mesh=mesh)
      >>> w = SplitTensor(jax.device_put(split_rows(packed, mesh.size), over), None, by="rows", mesh=mesh)
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
    """y = x ŵᵀ, each device multiplying with its part of the weight, by `spqr_matmul`.

    By rows, every device takes all of x, and y stays where it is computed, its last axis along the mesh. By columns,
    every device takes its own features, which without a permutation are those of the product before, and the results
    are summed over the devices, in x's type.

    Args:
      x: activations.
      w: the packed weight.
      implementation: as for `spqr_matmul`.

    Raises:
      SpqrError: as `spqr_matmul`.

    Example:
      >>> y = split_matmul(jax.nn.silu(split_matmul(x, up)), down)  # one sum over the devices
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
    # The interpreter of kernels loses track of what varies between the devices.
    checked = implementation != "interpret"
    return jax.shard_map(local, mesh=w.mesh, in_specs=(x_spec, P(axis)), out_specs=y_spec, check_vma=checked)(x, w)
