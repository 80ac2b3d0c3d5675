"""First-level statistics of a packed matrix, from their codes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels.format.bit_layout import BLOCK, unpack_plane_rows, unpack_planes
from pallas_kernels.format.tensor import SpqrTensor


def scales(tensor: SpqrTensor) -> Float[Array, "out groups"]:
    """First-level scales, float32."""
    return _statistics(tensor.scale, tensor.scale_codes, tensor.scale_scale, tensor.scale_zero)


def zeros(tensor: SpqrTensor) -> Float[Array, "out groups"]:
    """First-level zeros, float32."""
    return _statistics(tensor.zero, tensor.zero_codes, tensor.zero_scale, tensor.zero_zero)


def row_scales(tensor: SpqrTensor, rows: Int[Array, " rows"]) -> Float[Array, "rows groups"]:
    """First-level scales of some rows, float32."""
    return _of_rows(rows, tensor.scale, tensor.scale_codes, tensor.scale_scale, tensor.scale_zero)


def row_zeros(tensor: SpqrTensor, rows: Int[Array, " rows"]) -> Float[Array, "rows groups"]:
    """First-level zeros of some rows, float32."""
    return _of_rows(rows, tensor.zero, tensor.zero_codes, tensor.zero_scale, tensor.zero_zero)


def _of_rows(
    rows: Int[Array, " rows"],
    plain: Float[Array | np.ndarray, "out groups"] | None,
    planes: UInt16[Array | np.ndarray, "stats_bits row_blocks groups"] | None,
    scale: Float[Array | np.ndarray, "stats_groups groups"] | None,
    zero: Float[Array | np.ndarray, "stats_groups groups"] | None,
) -> Float[Array, "rows groups"]:
    if plain is not None:
        return jnp.asarray(plain)[rows].astype(jnp.float32)
    assert planes is not None
    assert scale is not None
    assert zero is not None
    codes = unpack_plane_rows(planes, rows).astype(jnp.float32)
    together = planes.shape[1] * BLOCK // scale.shape[0]
    own_scale, own_zero = (jnp.asarray(array)[rows // together].astype(jnp.float32) for array in (scale, zero))
    return own_scale * (codes - own_zero)


def _statistics(
    plain: Float[Array | np.ndarray, "out groups"] | None,
    planes: UInt16[Array | np.ndarray, "stats_bits row_blocks groups"] | None,
    scale: Float[Array | np.ndarray, "stats_groups groups"] | None,
    zero: Float[Array | np.ndarray, "stats_groups groups"] | None,
) -> Float[Array, "out groups"]:
    if plain is not None:
        return jnp.asarray(plain, jnp.float32)
    assert planes is not None
    assert scale is not None
    assert zero is not None
    codes = unpack_planes(planes).astype(jnp.float32)
    out, groups = codes.shape
    by_stats_group = codes.reshape(scale.shape[0], -1, groups)
    values = scale.astype(jnp.float32)[:, None] * (by_stats_group - zero.astype(jnp.float32)[:, None])
    return jnp.asarray(values.reshape(out, groups))
