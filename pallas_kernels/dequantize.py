"""From the packed format back to a dense weight, on any device."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends.devices import Implementation, choose, device_kind
from pallas_kernels.backends.triton.dequantize import dequantize_matrix
from pallas_kernels.format.bit_layout import unpack_codes, unpack_planes
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.measurements import best_tile


def spqr_dequantize(
    w: SpqrTensor, dtype: DTypeLike = jnp.float32, *, implementation: Implementation | None = None
) -> Float[Array, "out in"]:
    """ŵ = scale · (code − zero) + outlier residual, columns in the order of the input features.

    Args:
      w: the packed weight.
      dtype: of the result.
      implementation: as for `spqr_matmul`.

    Raises:
      SpqrError: the implementation cannot run here.

    Example:
      >>> weight = spqr_dequantize(quantize_matrix(weight, hessian, config))
    """
    chosen = choose(implementation)
    if chosen != "xla":
        tile = best_tile("dequantize", w, 1, device_kind())
        return dequantize_matrix(w, dtype, tile=tile, interpret=chosen == "interpret").T
    weight = dequantize_in_order(w).astype(dtype)
    return weight if w.permutation is None else weight[:, jnp.argsort(w.permutation)]


def dequantize_in_order(tensor: SpqrTensor) -> Float[Array, "out in"]:
    """The same in float32 with columns in quantization order, by XLA."""
    out, columns = tensor.shape
    codes = unpack_codes(tensor.codes, columns).astype(jnp.float32)
    grouped = codes.reshape(out, -1, tensor.group_size)
    weight = scales(tensor)[..., None] * (grouped - zeros(tensor)[..., None])
    weight = weight.reshape(out, columns)
    if (outliers := tensor.outliers) is None:
        return weight
    # Residuals at one place each: adding is writing, and the zeros of the padding do no harm.
    return weight.at[outliers.rows(), outliers.columns].add(outliers.values.astype(jnp.float32))


def scales(tensor: SpqrTensor) -> Float[Array, "out groups"]:
    """First-level scales, float32."""
    return _statistics(tensor.scale, tensor.scale_codes, tensor.scale_scale, tensor.scale_zero)


def zeros(tensor: SpqrTensor) -> Float[Array, "out groups"]:
    """First-level zeros, float32."""
    return _statistics(tensor.zero, tensor.zero_codes, tensor.zero_scale, tensor.zero_zero)


def _statistics(plain: Array | None, planes: Array | None, scale: Array | None, zero: Array | None) -> Array:
    if plain is not None:
        return plain.astype(jnp.float32)
    assert planes is not None
    assert scale is not None
    assert zero is not None
    codes = unpack_planes(planes).astype(jnp.float32)
    out, groups = codes.shape
    by_stats_group = codes.reshape(scale.shape[0], -1, groups)
    values = scale.astype(jnp.float32)[:, None] * (by_stats_group - zero.astype(jnp.float32)[:, None])
    return values.reshape(out, groups)
