"""The packed matrix as a pytree: its arrays, packing, and its size in bits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, UInt8, UInt16, UInt32

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.bit_layout import BLOCK, pack_codes, pack_planes
from pallas_kernels.format.outliers import Outliers

BITS = (2, 3, 4, 5, 8)
GROUP_SIZES = (8, 16, 32, 64, 128)
MAX_COLUMNS = 65536


class QuantizedStatistics(NamedTuple):
    """Quantized scales (or zeros) of all groups: value = scale · (codes − zero).

    Each row of `scale` and `zero` belongs to the rows of one statistics group.
    """

    codes: UInt8[Array | np.ndarray, "out groups"]
    scale: Float[Array | np.ndarray, "stats_groups groups"]
    zero: Float[Array | np.ndarray, "stats_groups groups"]


Statistics = Float[Array, "out groups"] | QuantizedStatistics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpqrTensor:
    """A weight `[out, in]` in SpQR's packed format, with the arrays that a checkpoint stores.

    In quantization order, ŵ = scale · (code − zero) plus the outliers' residuals. Column k of that order is input
    feature `permutation[k]`. Statistics are either floating-point (`scale`, `zero`) or quantized (`scale_codes`, …).
    Their type is the `stats_dtype` of `pack`: float16, or float32 to compare with other solvers.

    Attributes:
      codes: weight codes, see `bit_layout.pack_codes`.
      scale, zero: statistics of each group where they are not quantized, else None.
      scale_codes, zero_codes: codes of the statistics, see `bit_layout.pack_planes`.
      scale_scale, scale_zero, zero_scale, zero_zero: second-level statistics, one per statistics group and group.
      outliers: residuals w − ŵ of single weights; None for a matrix quantized without outliers.
      permutation: quantization order → input feature; None for the identity.
      in_features: number of columns.
      group_size: number of consecutive columns that share a scale and a zero.
    """

    codes: UInt32[Array | np.ndarray, "*stack bits out half_blocks"]
    scale: Float[Array | np.ndarray, "*stack out groups"] | None
    zero: Float[Array | np.ndarray, "*stack out groups"] | None
    scale_codes: UInt16[Array | np.ndarray, "*stack scale_bits row_blocks groups"] | None
    scale_scale: Float[Array | np.ndarray, "*stack stats_groups groups"] | None
    scale_zero: Float[Array | np.ndarray, "*stack stats_groups groups"] | None
    zero_codes: UInt16[Array | np.ndarray, "*stack zero_bits row_blocks groups"] | None
    zero_scale: Float[Array | np.ndarray, "*stack stats_groups groups"] | None
    zero_zero: Float[Array | np.ndarray, "*stack stats_groups groups"] | None
    outliers: Outliers | None
    permutation: UInt16[Array | np.ndarray, "*stack in"] | None
    in_features: int = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[-2], self.in_features

    @property
    def stack(self) -> tuple[int, ...]:
        """Numbers of matrices along the leading axes of a stack, see `stacks`; () for a single matrix."""
        return self.codes.shape[:-3]

    @property
    def size(self) -> int:
        """Number of weights, of all matrices of a stack."""
        return math.prod((*self.stack, *self.shape))

    @property
    def bits(self) -> int:
        """Width of a weight code."""
        return self.codes.shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def arrays(self) -> dict[str, Array | np.ndarray]:
        """The arrays that are present, by their names in a checkpoint.

        Example:
          >>> list(packed.arrays())[:2]
          ['codes', 'scale_codes']
        """
        found: dict[str, Array | np.ndarray | None] = {}
        for name in FIELDS:
            value = getattr(self, name)
            found |= value.arrays() if isinstance(value, Outliers) else {name: value}
        return {name: array for name, array in found.items() if array is not None}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array | np.ndarray], *, in_features: int, group_size: int
    ) -> "SpqrTensor":
        """Inverse of `arrays`."""
        return cls(
            **{name: arrays.get(name) for name in FIELDS if name != "outliers"},  # type: ignore[arg-type]
            outliers=Outliers.from_arrays(arrays),
            in_features=in_features,
            group_size=group_size,
        )


FIELDS = tuple(f.name for f in fields(SpqrTensor) if not f.metadata.get("static"))
"""Fields that hold arrays: one each, but for `outliers`."""


def bits_per_weight(tensor: SpqrTensor) -> float:
    """8 · bytes of all arrays / number of weights.

    The arrays are codes, both levels of statistics, outliers with their offsets, and the permutation.

    Example:
      >>> statistics = jnp.ones((32, 4))
      >>> bits_per_weight(pack(jnp.zeros((32, 64), jnp.uint8), statistics, statistics, bits=3, group_size=16))
      5.0
    """
    return 8 * tensor.nbytes / tensor.size


def outlier_share(tensor: SpqrTensor) -> Float[Array, ""]:
    """Number of outliers / number of weights.

    Example:
      >>> float(outlier_share(packed)) < 0.05
      True
    """
    return jnp.zeros(()) if tensor.outliers is None else jnp.sum(tensor.outliers.count) / tensor.size


def pack(
    codes: UInt8[Array | np.ndarray, "out in"],
    scale: Statistics | Float[np.ndarray, "out groups"],
    zero: Statistics | Float[np.ndarray, "out groups"],
    *,
    bits: int,
    group_size: int,
    scale_bits: int | None = None,
    zero_bits: int | None = None,
    outliers: tuple[Bool[Array | np.ndarray, "out in"], Float[Array | np.ndarray, "out in"]] | None = None,
    permutation: Integer[Array | np.ndarray, " in"] | None = None,
    stats_dtype: DTypeLike = jnp.float16,
) -> SpqrTensor:
    """Packs a quantized matrix, given in quantization order.

    Can be traced. The outlier arrays have room for every weight; `trim` cuts them to the number of outliers.

    Args:
      codes: weight codes, each below 2^bits.
      scale, zero: `[out, groups]`, or `QuantizedStatistics` with codes below 2^scale_bits and 2^zero_bits.
      bits: width of a weight code.
      group_size: consecutive columns that share a scale and a zero.
      scale_bits, zero_bits: width of the codes of quantized statistics.
      outliers: mask of the outliers, and the residuals w − ŵ (read only at outliers).
      permutation: quantization order → input feature.
      stats_dtype: type in which unquantized and second-level statistics are stored.

    Raises:
      SpqrError: the format does not support these sizes; the message names the size and what is supported.

    Example:
      >>> codes = jnp.full((32, 64), 5, jnp.uint8)
      >>> scale, zero = jnp.full((32, 4), 0.5), jnp.full((32, 4), 3.0)
      >>> w = trim(pack(codes, scale, zero, bits=3, group_size=16))
      >>> w.shape, float(spqr_dequantize(w)[0, 0])
      ((32, 64), 1.0)
    """
    out, columns = codes.shape
    check_format(out, columns, bits=bits, group_size=group_size, scale_bits=scale_bits, zero_bits=zero_bits)
    return SpqrTensor(
        codes=pack_codes(codes, bits),
        **_statistics("scale", scale, scale_bits, stats_dtype),
        **_statistics("zero", zero, zero_bits, stats_dtype),
        outliers=None if outliers is None else Outliers.from_dense(*outliers),
        permutation=None if permutation is None else permutation.astype(jnp.uint16),
        in_features=columns,
        group_size=group_size,
    )


def trim(tensor: SpqrTensor) -> SpqrTensor:
    """The matrix with outlier arrays without padding. Needs concrete arrays, so it cannot be traced."""
    return tensor if tensor.outliers is None else replace(tensor, outliers=tensor.outliers.trim())


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
    """Checks that a matrix and its settings fit the packed format.

    Args:
      out, columns: rows and columns of the matrix.
      bits: width of a weight code.
      group_size: consecutive columns that share a scale and a zero.
      scale_bits, zero_bits: width of statistics codes; None for unquantized statistics.
      stats_group_size: consecutive rows whose statistics are quantized together.

    Raises:
      SpqrError: the format does not support a setting.

    Example:
      >>> check_format(64, 100, bits=3, group_size=16, scale_bits=3, zero_bits=3)
      Traceback (most recent call last):
      pallas_kernels.errors.SpqrError: 100 input features do not divide into groups of 16
    """
    if bits not in BITS:
        raise SpqrError(f"bits is {bits}, but must be one of {BITS}")
    if group_size not in GROUP_SIZES:
        raise SpqrError(f"group_size is {group_size}, but must be one of {GROUP_SIZES}")
    if columns % group_size:
        raise SpqrError(f"{columns} input features do not divide into groups of {group_size}")
    if columns > MAX_COLUMNS:
        raise SpqrError(f"{columns} input features are more than the format's {MAX_COLUMNS}")
    for name, stats_bits in (("scale_bits", scale_bits), ("zero_bits", zero_bits)):
        if stats_bits is None:
            continue
        if stats_bits not in BITS:
            raise SpqrError(f"{name} is {stats_bits}, but must be one of {BITS} or None")
        if stats_group_size % BLOCK or stats_group_size < BLOCK:
            raise SpqrError(f"stats_group_size is {stats_group_size}, but must be a multiple of {BLOCK}")
        if out % stats_group_size:
            raise SpqrError(f"{out} output rows do not divide into statistics groups of {stats_group_size}")


def _statistics(
    name: str, statistics: Statistics | Float[np.ndarray, "out groups"], bits: int | None, dtype: DTypeLike
) -> dict[str, Array | np.ndarray | None]:
    """The four fields of an `SpqrTensor` for its scales, or for its zeros."""
    if isinstance(statistics, QuantizedStatistics):
        if bits is None:
            raise SpqrError(f"quantized {name}s need {name}_bits, the width of their codes")
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
