"""Packs a quantized matrix from the parts that checkpoints of other projects hold, and unpacks it."""

from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Int, Integer, UInt8

from converters.errors import ConversionError
from pallas_kernels import Outliers, QuantizedStatistics, SpqrTensor, pack
from pallas_kernels.backends.xla import dequantize_in_order

# Largest relative change of statistics by rounding to float16: some sixteen times the usual.
_MAX_LOSS = 2.0**-7

_DEQUANTIZE = jax.jit(dequantize_in_order)
_PACK = jax.jit(pack, static_argnames=("bits", "group_size", "scale_bits", "zero_bits"))


class StoredStatistics(NamedTuple):
    """Scales (or zeros) of all groups, themselves quantized, in host memory; see `QuantizedStatistics`."""

    codes: UInt8[np.ndarray, "out groups"]
    scale: Float[np.ndarray, "stats_groups groups"]
    zero: Float[np.ndarray, "stats_groups groups"]

    def values(self, dtype: type[np.floating]) -> Float[np.ndarray, "out groups"]:
        """scale · (code − zero), every step rounded to `dtype`."""
        rows = len(self.codes) // len(self.scale)
        scale, zero = (np.repeat(part.astype(dtype), rows, axis=0) for part in (self.scale, self.zero))
        return scale * (self.codes.astype(dtype) - zero)


Statistics = Float[np.ndarray, "out groups"] | StoredStatistics


class StoredOutliers(NamedTuple):
    """Outliers in CSR form, columns in quantization order; values are weights, residuals or summands by context."""

    offsets: Integer[np.ndarray, " out+1"]
    columns: Integer[np.ndarray, " nnz"]
    values: Float[np.ndarray, " nnz"]

    @property
    def rows(self) -> Int[np.ndarray, " nnz"]:
        """Row of each outlier."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def check_outliers(outliers: StoredOutliers, in_features: int, name: str) -> None:
    """Raises a ConversionError where a column is beyond the matrix or repeated in a row, or a value is not finite."""
    columns = outliers.columns.astype(np.int64)
    if columns.size and columns.max() >= in_features:
        raise ConversionError(f"{name} has an outlier in column {columns.max()}, but only {in_features} columns")
    if repeated := columns.size - np.unique(outliers.rows * in_features + columns).size:
        raise ConversionError(f"{name} has {repeated} of {columns.size} outliers at a place that has one already")
    check_finite(outliers.values, f"outliers of {name}")


def check_permutation(permutation: Integer[np.ndarray, " in"], name: str) -> None:
    """Raises a ConversionError where not every position comes once."""
    missing = np.setdiff1d(np.arange(permutation.size), permutation)
    if missing.size:
        raise ConversionError(
            f"the permutation of {name} lacks {missing.size} of {permutation.size} features, {missing[0]} first"
        )


def check_finite(values: Float[np.ndarray, "..."], what: str) -> None:
    """Raises a ConversionError that counts the values that are NaN or infinite."""
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        raise ConversionError(f"the {what} have {bad} of {values.size} values that are not finite in float16")


def stored_outliers(tensor: SpqrTensor) -> StoredOutliers:
    """A packed matrix's outliers without padding, in host memory; their values are residuals."""
    if tensor.outliers is None:
        return StoredOutliers(np.zeros(tensor.shape[0] + 1, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.float16))
    trimmed = tensor.outliers.trim()
    return StoredOutliers(*map(np.asarray, (trimmed.offsets, trimmed.columns, trimmed.values)))


def weight_in_order(tensor: SpqrTensor) -> Float32[np.ndarray, "out in"]:
    """`dequantize_in_order` in host memory, compiled once for all matrices of a shape.

    The outliers are added afterwards, because JAX would compile anew for each number of them.
    """
    weight = np.array(_DEQUANTIZE(replace(tensor, outliers=None)))
    outliers = stored_outliers(tensor)
    weight[outliers.rows, outliers.columns] += outliers.values.astype(np.float32)
    return weight


def quantized_tensor(
    codes: UInt8[np.ndarray, "out in"],
    scale: Statistics,
    zero: Statistics,
    outliers: StoredOutliers,
    permutation: Integer[np.ndarray, " in"] | None,
    *,
    name: str,
    bits: int,
    group_size: int,
    scale_bits: int | None,
    zero_bits: int | None,
) -> SpqrTensor:
    """Packs a matrix that is given in quantization order; the result is in host memory.

    Statistics are rounded to float16. Outliers, whose values are the weights themselves, become residuals
    float16(value − scale · (code − zero)), so `dequantize` gives their values up to the rounding of that residual.

    Args:
      codes: weight codes, each below 2^bits.
      scale, zero: of all groups, quantized or not.
      outliers: checked by `check_outliers`.
      permutation: quantization order → input feature, checked by `check_permutation`; the identity is not stored.
      name: the matrix, for error messages.
      bits, group_size, scale_bits, zero_bits: as in `pallas_kernels.pack`.

    Raises:
      ConversionError: scales, zeros or residuals are not finite, or not the same, in float16.
      SpqrError: the packed format does not support these sizes.

    Example:
      >>> codes, ones = np.zeros((16, 32), np.uint8), np.ones((16, 2), np.float32)
      >>> outliers = StoredOutliers(np.zeros(17, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.float16))
      >>> options = {"name": "q", "bits": 4, "group_size": 16, "scale_bits": None, "zero_bits": None}
      >>> quantized_tensor(codes, ones, ones, outliers, None, **options).shape
      (16, 32)
    """
    scale, zero = _in_float16(scale, f"scales of {name}"), _in_float16(zero, f"zeros of {name}")
    packed = _PACK(
        codes,
        _for_packing(scale),
        _for_packing(zero),
        bits=bits,
        group_size=group_size,
        scale_bits=scale_bits,
        zero_bits=zero_bits,
    )
    # Only at the outliers: a dense mask, or the dense weight, would be many times larger than the packed matrix.
    rows, groups = outliers.rows, outliers.columns // group_size
    beneath = _values(scale)[rows, groups] * (codes[rows, outliers.columns] - _values(zero)[rows, groups])
    with np.errstate(over="ignore"):
        residuals = (outliers.values.astype(np.float32) - beneath).astype(np.float16)
    check_finite(residuals, f"outliers' residuals of {name}")
    if permutation is not None and np.array_equal(permutation, np.arange(permutation.size)):
        permutation = None
    kept = Outliers(outliers.offsets.astype(np.int32), outliers.columns.astype(np.uint16), residuals)
    stored = None if permutation is None else permutation.astype(np.uint16)
    return jax.tree.map(np.asarray, replace(packed, outliers=kept, permutation=stored))


def _in_float16(statistics: Statistics, what: str) -> Statistics:
    """Rounds statistics to float16, except codes."""
    exact = _values(statistics)
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(statistics, StoredStatistics):
            scale, zero = statistics.scale.astype(np.float16), statistics.zero.astype(np.float16)
            statistics = statistics._replace(scale=scale, zero=zero)
        else:
            statistics = statistics.astype(np.float16)
        rounded = _values(statistics)
    check_finite(rounded, what)
    # Second-level scales of wide codes can be too small for float16.
    loss = np.abs(rounded - exact).max() / (np.abs(exact).max() or 1)
    if loss > _MAX_LOSS:
        raise ConversionError(f"the {what} change by {loss:.1%} of the largest when their parts are put in float16")
    return statistics


def _for_packing(statistics: Statistics) -> Float[np.ndarray, "out groups"] | QuantizedStatistics:
    return QuantizedStatistics(*statistics) if isinstance(statistics, StoredStatistics) else statistics


def _values(statistics: Statistics) -> Float[np.ndarray, "out groups"]:
    """Scales or zeros of all groups, float32."""
    if isinstance(statistics, StoredStatistics):
        return statistics.values(np.float32)
    return statistics.astype(np.float32)
