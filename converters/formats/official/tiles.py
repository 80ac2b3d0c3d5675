"""The format of the official SpQR GPU library: 3-bit codes in tiles of 16 × 16, sixteen of them to a 64-bit word.

A word holds what one row of a tile has: the code of its scale in bits 0-2, of its zero in bits 3-5, sixteen weight
codes from bit 6 on, and from bit 54 on one byte of the tile's second-level statistics. These are four float16 numbers,
scale_scale, zero_scale, scale_zero, zero_zero; byte k of the eight is in rows 2k and 2k + 1. Bits 62 and 63 are zero.
`dense_weights` has one row of tiles after the other, and a tile's words by row. `row_offsets` and `col_vals` are the
outliers. `in_perm` is the permutation, two uint16 in an int32, the first one low; empty, it is the identity.

The official writer stores an outlier's whole weight, which the official reader for GPUs adds to the weight of the code
beneath. It is read here as the weight, as the writer meant it. Written here are values for which the reader's sum
is the weight; to be read back, they must be marked as such (`added`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float16, Float32, UInt8, UInt16, UInt64

from converters.errors import ConversionError
from converters.formats.official.outliers import decode_outliers, encode_outliers
from converters.formats.official.quantized_matrix import (
    StoredOutliers,
    StoredStatistics,
    check_finite,
    check_outliers,
    check_permutation,
    quantized_tensor,
    stored_outliers,
    weight_in_order,
)
from pallas_kernels import SpqrTensor
from pallas_kernels.format.bit_layout import unpack_codes, unpack_planes
from pallas_kernels.format.tensor import MAX_COLUMNS

TILE = 16
BITS = 3
STATISTICS_SHIFT = BITS * (2 + TILE)
# The official readers keep an outlier's column in a signed 16-bit number.
READER_COLUMNS = 2**15

TYPES = {"dense_weights": np.int64, "row_offsets": np.int32, "col_vals": np.int32, "in_perm": np.int32}
"""The arrays of a matrix and their types."""

UNPACK_CODES = jax.jit(unpack_codes, static_argnames="columns")
UNPACK_PLANES = jax.jit(unpack_planes)


@dataclass(frozen=True)
class TiledMatrix:
    """Content of the four arrays, unpacked, in quantization order.

    Attributes:
      codes: weight codes.
      scale, zero: statistics, with second-level statistics for every tile.
      outliers: their values are weights, or summands of the weights beneath; the format leaves it open.
      permutation: quantization order → input feature; None where the format has it empty.
    """

    codes: UInt8[np.ndarray, "out in"]
    scale: StoredStatistics
    zero: StoredStatistics
    outliers: StoredOutliers
    permutation: UInt16[np.ndarray, " in"] | None


def decode_tensor(
    arrays: Mapping[str, np.ndarray], shape: tuple[int, int], name: str, *, added: bool = False
) -> SpqrTensor:
    """Decodes `dense_weights`, `row_offsets`, `col_vals` and `in_perm` into a packed matrix.

    Args:
      shape: (out, in).
      name: the matrix, for error messages.
      added: whether an outlier's value is to be added to `reader_weight`, as `encode_tensor` writes it; otherwise it
        is the outlier's weight.

    Raises:
      ConversionError: the arrays contradict the shape, each other or the format, or an outlier overflows float16.

    Example:
      >>> arrays = {"dense_weights": np.zeros(16, np.int64), "row_offsets": np.zeros(17, np.int32)}
      >>> arrays |= {"col_vals": np.zeros(0, np.int32), "in_perm": np.zeros(0, np.int32)}
      >>> decode_tensor(arrays, (16, 16), "q_proj").shape
      (16, 16)
    """
    matrix = decode_arrays(arrays, shape, name)
    outliers = matrix.outliers
    if added:
        rows, columns = outliers.rows, outliers.columns
        scale, zero = (part.values(np.float16)[rows, columns // TILE] for part in (matrix.scale, matrix.zero))
        beneath = scale * (matrix.codes[rows, columns].astype(np.float16) - zero)
        outliers = outliers._replace(values=beneath.astype(np.float32) + outliers.values)
    return quantized_tensor(
        matrix.codes,
        matrix.scale,
        matrix.zero,
        outliers,
        matrix.permutation,
        name=name,
        bits=BITS,
        group_size=TILE,
        scale_bits=BITS,
        zero_bits=BITS,
    )


def encode_tensor(tensor: SpqrTensor, name: str) -> dict[str, np.ndarray]:
    """Encodes a packed matrix for the official reader for GPUs: outliers in CSR, to be added to `reader_weight`.

    float16(reader_weight + value) is the outlier's weight rounded to float16 wherever some value, above some code,
    makes it so, and the nearest possible elsewhere. The identity permutation is written in full, as the official
    writer does.

    Raises:
      ConversionError: the format cannot hold the matrix, or the reader's float16 arithmetic overflows.

    Example:
      >>> arrays = {"dense_weights": np.zeros(16, np.int64), "row_offsets": np.zeros(17, np.int32)}
      >>> arrays |= {"col_vals": np.zeros(0, np.int32), "in_perm": np.zeros(0, np.int32)}
      >>> encode_tensor(decode_tensor(arrays, (16, 16), "q_proj"), "q_proj")["dense_weights"].dtype
      dtype('int64')
    """
    _check_format(tensor, name)
    outliers = stored_outliers(tensor)
    rows, columns = outliers.rows, outliers.columns
    weight = weight_in_order(tensor)[rows, columns]
    codes = np.array(UNPACK_CODES(tensor.codes, columns=tensor.in_features))
    permutation = np.arange(tensor.in_features) if tensor.permutation is None else np.asarray(tensor.permutation)
    matrix = TiledMatrix(
        codes, _statistics(tensor, "scale"), _statistics(tensor, "zero"), outliers, permutation.astype(np.uint16)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        scale, zero = matrix.scale.values(np.float16), matrix.zero.values(np.float16)
        extremes = np.stack([scale * (code - zero) for code in np.array([0, 2**BITS - 1], np.float16)])
    check_finite(extremes, f"weights that the official reader computes for {name}")
    groups = rows, columns // TILE
    codes[rows, columns], values = _added_values(weight, codes[rows, columns], scale[groups], zero[groups])
    check_finite(values, f"outliers of {name}")
    return encode_arrays(replace(matrix, codes=codes, outliers=outliers._replace(values=values)))


def reader_weight(matrix: TiledMatrix) -> Float16[np.ndarray, "out in"]:
    """Weight without outliers as the official readers compute it: scale · (code − zero), every step in float16."""
    scale, zero = (np.repeat(part.values(np.float16), TILE, axis=1) for part in (matrix.scale, matrix.zero))
    return scale * (matrix.codes.astype(np.float16) - zero)


def decode_arrays(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], name: str) -> TiledMatrix:
    """Unpacks the four arrays; the outliers may be in CSR or PTCSR, and `in_perm` may be absent.

    Raises:
      ConversionError: the arrays contradict the shape, each other or the format.
    """
    out, in_features = shape
    arrays = {"in_perm": np.zeros(0, np.int32), **arrays}
    _check_sizes(arrays, shape, name)
    tiles = arrays["dense_weights"].view(np.uint64).reshape(out // TILE, in_features // TILE, TILE)
    words = tiles.swapaxes(1, 2).reshape(out, in_features // TILE)
    codes = np.empty((*words.shape, TILE), np.uint8)
    for k in range(TILE):
        codes[..., k] = _code(words, 2 + k)
    scale_scale, zero_scale, scale_zero, zero_zero = _second_level(words, name)
    outliers = decode_outliers(arrays["row_offsets"], arrays["col_vals"], out, name)
    check_outliers(outliers, in_features, name)
    permutation = arrays["in_perm"].astype("<i4").view("<u2")
    if permutation.size:
        check_permutation(permutation, name)
    return TiledMatrix(
        codes.reshape(shape),
        StoredStatistics(_code(words, 0), scale_scale, scale_zero),
        StoredStatistics(_code(words, 1), zero_scale, zero_zero),
        outliers,
        permutation if permutation.size else None,
    )


def encode_arrays(matrix: TiledMatrix, order: Literal["csr", "ptcsr"] = "csr") -> dict[str, np.ndarray]:
    """Inverse of `decode_arrays`, with the outliers in either order."""
    out, in_features = matrix.codes.shape
    scale, zero = matrix.scale, matrix.zero
    words = np.zeros(scale.codes.shape, np.uint64)
    for k, codes in enumerate([scale.codes, zero.codes, *np.moveaxis(matrix.codes.reshape(out, -1, TILE), 2, 0)]):
        words |= codes.astype(np.uint64) << BITS * k
    numbers = np.stack([scale.scale, zero.scale, scale.zero, zero.zero], axis=-1)
    octets = np.repeat(numbers.astype("<f2").view(np.uint8).swapaxes(1, 2), 2, axis=1)
    words |= octets.reshape(words.shape).astype(np.uint64) << STATISTICS_SHIFT
    tiles = words.reshape(out // TILE, TILE, in_features // TILE).swapaxes(1, 2)
    row_offsets, col_vals = encode_outliers(matrix.outliers, order)
    permutation = np.zeros(0, np.uint16) if matrix.permutation is None else matrix.permutation
    return {
        "dense_weights": tiles.reshape(-1).view(np.int64),
        "row_offsets": row_offsets,
        "col_vals": col_vals,
        "in_perm": permutation.astype("<u2").view("<i4"),
    }


def _added_values(
    weight: Float32[np.ndarray, " nnz"],
    codes: UInt8[np.ndarray, " nnz"],
    scale: Float16[np.ndarray, " nnz"],
    zero: Float16[np.ndarray, " nnz"],
) -> tuple[UInt8[np.ndarray, " nnz"], Float16[np.ndarray, " nnz"]]:
    """Codes and values for which float16(scale · (code − zero) + value) is nearest to the weights in float16.

    A value that is larger than the weight can be too coarse, and is smaller above another code. Any code serves
    beneath an outlier, but the present one stays where none is better.
    """
    target = weight.astype(np.float16).astype(np.float32)
    choices = np.concatenate([codes[None], np.indices((2**BITS, codes.size), np.uint8)[0]])
    beneath = (scale * (choices.astype(np.float16) - zero)).astype(np.float32)
    with np.errstate(over="ignore"):
        values = (target - beneath).astype(np.float16)
        errors = np.abs((beneath + values).astype(np.float16) - target)
    best = errors.argmin(axis=0)[None]
    return np.take_along_axis(choices, best, axis=0)[0], np.take_along_axis(values, best, axis=0)[0]


def _statistics(tensor: SpqrTensor, kind: Literal["scale", "zero"]) -> StoredStatistics:
    codes = UNPACK_PLANES(getattr(tensor, f"{kind}_codes"))
    parts = (codes, getattr(tensor, f"{kind}_scale"), getattr(tensor, f"{kind}_zero"))
    return StoredStatistics(*(np.asarray(part) for part in parts))


def _code(words: UInt64[np.ndarray, "out groups"], index: int) -> UInt8[np.ndarray, "out groups"]:
    return (words >> BITS * index & (2**BITS - 1)).astype(np.uint8)


def _second_level(words: UInt64[np.ndarray, "out groups"], name: str) -> Float16[np.ndarray, "4 stats_groups groups"]:
    """The four numbers of every tile."""
    if unused := np.count_nonzero(words >> STATISTICS_SHIFT + 8):
        raise ConversionError(f"{name}.dense_weights has {unused} words with bit 62 or 63 set, which must be zero")
    octets = (words >> STATISTICS_SHIFT).astype(np.uint8).reshape(-1, TILE // 2, 2, words.shape[1])
    if unequal := np.count_nonzero(octets[:, :, 0] != octets[:, :, 1]):
        raise ConversionError(
            f"{name}.dense_weights has {unequal} pairs of rows whose bytes of second-level statistics differ"
        )
    numbers = np.ascontiguousarray(octets[:, :, 0].swapaxes(1, 2)).view("<f2")
    check_finite(numbers, f"second-level statistics of {name}")
    return np.moveaxis(numbers, 2, 0)


def _check_sizes(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], name: str) -> None:
    """Raises a ConversionError where an array is missing, of another type, or too short or long for the matrix."""
    out, in_features = shape
    _check_shape(out, in_features, MAX_COLUMNS, name)
    for part, dtype in TYPES.items():
        if part not in arrays:
            raise ConversionError(f"{name}.{part} is missing")
        found = arrays[part]
        if found.ndim != 1 or (found.size and found.dtype != dtype):
            raise ConversionError(
                f"{name}.{part} is {found.dtype} of shape {list(found.shape)}, but must be a row of {np.dtype(dtype)}"
            )
    for part, sizes in (("dense_weights", (out * in_features // TILE,)), ("in_perm", (in_features // 2, 0))):
        if (size := arrays[part].size) not in sizes:
            raise ConversionError(f"{name}.{part} has {size} entries, but {out} × {in_features} takes {sizes[0]}")


def _check_format(tensor: SpqrTensor, name: str) -> None:
    """Raises a ConversionError where the official format cannot hold a matrix."""
    out, in_features = tensor.shape
    found = {"bits": (tensor.bits, BITS), "groups": (tensor.group_size, TILE)}
    for kind in ("scale", "zero"):
        planes, numbers = getattr(tensor, f"{kind}_codes"), getattr(tensor, f"{kind}_scale")
        found[f"{kind} bits"] = 16 if planes is None else len(planes), BITS
        found[f"{kind} statistics groups"] = TILE if numbers is None else out // len(numbers), TILE
    if wrong := [f"{what} {value}" for what, (value, needed) in found.items() if value != needed]:
        raise ConversionError(
            f"{name} has {', '.join(wrong)}, but the official SpQR format has {BITS} bits, also for scales and zeros, "
            f"and groups and statistics groups of {TILE}"
        )
    _check_shape(out, in_features, READER_COLUMNS, name)


def _check_shape(out: int, in_features: int, most: int, name: str) -> None:
    if out % TILE or in_features % TILE or out == 0 or not 0 < in_features <= most:
        raise ConversionError(
            f"{name} is {out} × {in_features}, but the official SpQR format has multiples of {TILE}, "
            f"columns up to {most}"
        )
