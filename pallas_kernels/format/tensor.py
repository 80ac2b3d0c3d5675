"""The packed matrix as a pytree: what it stores, how it is made, how many bits it takes."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8, UInt16, UInt32

from pallas_kernels.format.bit_layout import BLOCK, pack_codes, pack_planes

BITS = (2, 3, 4, 5, 8)
GROUP_SIZES = (8, 16, 32, 64, 128)
MAX_COLUMNS = 65536


class QuantizedStatistics(NamedTuple):
    """Scales (or zeros) of all groups, themselves quantized: value = scale · (codes − zero).

    `scale` and `zero` serve the rows of one statistics group each.
    """

    codes: UInt8[Array, "out groups"]
    scale: Float[Array, "stats_groups groups"]
    zero: Float[Array, "stats_groups groups"]


Statistics = Float[Array, "out groups"] | QuantizedStatistics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpqrTensor:
    """A weight `[out, in]` in SpQR's packed format; every array is what a checkpoint stores, nothing is unpacked.

    In quantization order, ŵ = scale · (code − zero) plus the outliers' residuals. Column k of that order is input
    feature `permutation[k]`. Statistics are either 16-bit (`scale`, `zero`) or quantized (`scale_codes`, …).

    Attributes:
      codes: weight codes, see `bit_layout.pack_codes`.
      scale, zero: statistics of each group, where they are not quantized.
      scale_codes, zero_codes: codes of the statistics, see `bit_layout.pack_planes`.
      scale_scale, scale_zero, zero_scale, zero_zero: second-level statistics, one per statistics group and group.
      row_offsets, outlier_columns, outlier_values: the outliers in CSR form: positions in quantization order and
        residuals w − ŵ; all None for a matrix quantized without outliers. Entries from `row_offsets[-1]` on are
        padding and zero.
      permutation: quantization order → input feature; None for the identity.
      in_features: number of columns.
      group_size: number of consecutive columns that share a scale and a zero.
    """

    codes: UInt32[Array, "*stack bits out half_blocks"]
    scale: Float16[Array, "*stack out groups"] | None
    zero: Float16[Array, "*stack out groups"] | None
    scale_codes: UInt16[Array, "*stack scale_bits out/16 groups"] | None
    scale_scale: Float16[Array, "*stack stats_groups groups"] | None
    scale_zero: Float16[Array, "*stack stats_groups groups"] | None
    zero_codes: UInt16[Array, "*stack zero_bits out/16 groups"] | None
    zero_scale: Float16[Array, "*stack stats_groups groups"] | None
    zero_zero: Float16[Array, "*stack stats_groups groups"] | None
    row_offsets: Int[Array, "*stack out+1"] | None
    outlier_columns: UInt16[Array, "*stack nnz"] | None
    outlier_values: Float16[Array, "*stack nnz"] | None
    permutation: UInt16[Array, "*stack in"] | None
    in_features: int = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[-2], self.in_features

    @property
    def bits(self) -> int:
        """Width of a weight code."""
        return self.codes.shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def arrays(self) -> dict[str, Array]:
        """The arrays that are present, by field name."""
        return {name: value for name in ARRAY_FIELDS if (value := getattr(self, name)) is not None}


ARRAY_FIELDS = tuple(f.name for f in fields(SpqrTensor) if not f.metadata.get("static"))


def bits_per_weight(tensor: SpqrTensor) -> float:
    """8 · bytes of all arrays / number of weights: codes, both levels of statistics, outliers, offsets, permutation."""
    return 8 * tensor.nbytes / _weights(tensor)


def outlier_share(tensor: SpqrTensor) -> Float[Array, ""]:
    """Number of outliers / number of weights."""
    return jnp.zeros(()) if tensor.row_offsets is None else jnp.sum(tensor.row_offsets[..., -1]) / _weights(tensor)


def pack(
    codes: UInt8[Array, "out in"],
    scale: Statistics,
    zero: Statistics,
    *,
    bits: int,
    group_size: int,
    scale_bits: int | None = None,
    zero_bits: int | None = None,
    outliers: tuple[Bool[Array, "out in"], Float[Array, "out in"]] | None = None,
    permutation: Int[Array, " in"] | None = None,
    stats_dtype: Any = jnp.float16,
) -> SpqrTensor:
    """Packs a quantized matrix, given in quantization order.

    Can be traced: the outlier arrays then have room for every weight, and `trim` cuts them to what is used.

    Args:
      codes: weight codes, each below 2^bits.
      scale, zero: `[out, groups]`, or `QuantizedStatistics` with codes below 2^scale_bits and 2^zero_bits.
      outliers: which weights are outliers, and the residuals w − ŵ (read only at outliers).
      permutation: quantization order → input feature.
      stats_dtype: type in which unquantized and second-level statistics are held.

    Raises:
      ValueError: the format does not support these sizes; the message says which.

    Example:
      >>> packed = trim(pack(codes, scale, zero, bits=3, group_size=16, outliers=(mask, residual)))
    """
    out, columns = codes.shape
    check_format(out, columns, bits=bits, group_size=group_size, scale_bits=scale_bits, zero_bits=zero_bits)
    row_offsets = outlier_columns = outlier_values = None
    if outliers is not None:
        row_offsets, outlier_columns, outlier_values = _compressed_rows(*outliers)
    return SpqrTensor(
        codes=pack_codes(codes, bits),
        **_statistics("scale", scale, scale_bits, stats_dtype),
        **_statistics("zero", zero, zero_bits, stats_dtype),
        row_offsets=row_offsets,
        outlier_columns=outlier_columns,
        outlier_values=outlier_values,
        permutation=None if permutation is None else permutation.astype(jnp.uint16),
        in_features=columns,
        group_size=group_size,
    )


def trim(tensor: SpqrTensor) -> SpqrTensor:
    """Cuts the padding off the outlier arrays. Needs concrete arrays, so it cannot be traced."""
    if tensor.row_offsets is None or tensor.outlier_columns is None or tensor.outlier_values is None:
        return tensor
    # Through NumPy: JAX would compile a slice anew for each count. Copied, so that the padding is not kept alive.
    count = int(np.asarray(tensor.row_offsets)[-1])
    return replace(
        tensor,
        outlier_columns=jax.device_put(np.asarray(tensor.outlier_columns)[:count].copy()),
        outlier_values=jax.device_put(np.asarray(tensor.outlier_values)[:count].copy()),
    )


def check_format(
    out: int,
    columns: int,
    *,
    bits: int,
    group_size: int,
    scale_bits: int | None,
    zero_bits: int | None,
    stats_group_size: int = BLOCK,
) -> None:
    """Raises a ValueError with the numbers in it where a matrix or its settings do not fit the packed format."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, but must be one of {BITS}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, but must be one of {GROUP_SIZES}")
    if columns % group_size:
        raise ValueError(f"{columns} input features do not divide into groups of {group_size}")
    if columns > MAX_COLUMNS:
        raise ValueError(f"{columns} input features are more than the format's {MAX_COLUMNS}")
    for name, stats_bits in (("scale_bits", scale_bits), ("zero_bits", zero_bits)):
        if stats_bits is None:
            continue
        if stats_bits not in BITS:
            raise ValueError(f"{name} is {stats_bits}, but must be one of {BITS} or None")
        if stats_group_size % BLOCK or stats_group_size < BLOCK:
            raise ValueError(f"stats_group_size is {stats_group_size}, but must be a multiple of {BLOCK}")
        if out % stats_group_size:
            raise ValueError(f"{out} output rows do not divide into statistics groups of {stats_group_size}")


def _statistics(name: str, statistics: Statistics, bits: int | None, dtype: Any) -> dict[str, Array | None]:
    """The four fields of `SpqrTensor` that hold the scales, or the zeros."""
    if isinstance(statistics, QuantizedStatistics):
        if bits is None:
            raise ValueError(f"quantized {name}s need {name}_bits")
        return {
            name: None,
            f"{name}_codes": pack_planes(statistics.codes, bits),
            f"{name}_scale": statistics.scale.astype(dtype),
            f"{name}_zero": statistics.zero.astype(dtype),
        }
    return {
        name: statistics.astype(dtype),
        f"{name}_codes": None,
        f"{name}_scale": None,
        f"{name}_zero": None,
    }


def _compressed_rows(mask: Bool[Array, "out in"], residual: Float[Array, "out in"]) -> tuple[Array, Array, Array]:
    """CSR of the masked residuals, with room for all of them."""
    out, columns = mask.shape
    row_offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(mask.sum(axis=1, dtype=jnp.int32))])
    flat = mask.reshape(-1)
    slots = jnp.where(flat, jnp.cumsum(flat) - 1, flat.size)
    column = jnp.tile(jnp.arange(columns, dtype=jnp.uint16), out)
    value = residual.reshape(-1).astype(jnp.float16)
    outlier_columns = jnp.zeros(flat.size, jnp.uint16).at[slots].set(column, mode="drop")
    outlier_values = jnp.zeros(flat.size, jnp.float16).at[slots].set(value, mode="drop")
    return row_offsets, outlier_columns, outlier_values


def _weights(tensor: SpqrTensor) -> int:
    stack = tensor.codes.shape[0] if tensor.codes.ndim == 4 else 1
    return stack * tensor.shape[0] * tensor.shape[1]
