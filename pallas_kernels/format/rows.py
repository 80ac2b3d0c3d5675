"""Joining and splitting of packed matrices by rows, for fused projections and tensor parallelism.

Nothing is quantized again: each row has its own codes, statistics and outliers. Rows share only the permutation.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.outliers import join
from pallas_kernels.format.stacks import element, stack
from pallas_kernels.format.tensor import SpqrTensor

Stored = Array | np.ndarray
ROW_FIELDS = (
    "codes",
    "scale",
    "zero",
    "scale_codes",
    "zero_codes",
    "scale_scale",
    "scale_zero",
    "zero_scale",
    "zero_zero",
)
"""Arrays whose last axis but one follows the rows: each row, each sixteen rows, or each statistics group."""


def concatenate_rows(tensors: Sequence[SpqrTensor]) -> SpqrTensor:
    """Stacks packed matrices `[out_i, in]` vertically: ŵ = [ŵ_0; ŵ_1; …], exactly.

    Args:
      tensors: concrete matrices with the same input features, permutation and format. Outliers are trimmed. Stacked
        matrices (leading axis) are joined element by element.

    Returns:
      `[Σ out_i, in]`.

    Raises:
      SpqrError: there are no matrices, or they differ in what the rows of one matrix share.

    Example:
      >>> twice = concatenate_rows([packed, packed])
      >>> packed.shape, twice.shape
      ((64, 64), (128, 64))
    """
    if reason := why_not_one(tensors):
        raise SpqrError(reason)
    first = tensors[0]
    if first.stack:
        elements = [[element(tensor, index) for tensor in tensors] for index in range(len(first.codes))]
        return stack([concatenate_rows(matrices) for matrices in elements])
    joined: dict[str, Any] = {
        name: _joined_arrays([getattr(tensor, name) for tensor in tensors])
        for name in ROW_FIELDS
        if getattr(first, name) is not None
    }
    return replace(first, **joined, outliers=join([(tensor.outliers, tensor.shape[0]) for tensor in tensors]))


def why_not_one(tensors: Sequence[SpqrTensor]) -> str | None:
    """The reason why `concatenate_rows` cannot join matrices, in a sentence; None where it can.

    Example:
      >>> why_not_one([packed, replace(packed, permutation=packed.permutation[::-1])])
      'matrices 0 and 1 have different permutations, so they cannot be rows of one'
    """
    if not tensors:
        return "there are no matrices to join"
    formats = [_shared_by_rows(tensor) for tensor in tensors]
    for name in formats[0]:
        values = [shared[name] for shared in formats]
        if len(set(values)) > 1:
            return f"matrices that differ in {name} ({', '.join(map(str, values))}) cannot be rows of one"
    for index, tensor in enumerate(tensors[1:], 1):
        if not _equal(tensor.permutation, tensors[0].permutation):
            return f"matrices 0 and {index} have different permutations, so they cannot be rows of one"
    return None


def split_rows(tensor: SpqrTensor, parts: int) -> SpqrTensor:
    """Cuts a packed matrix into `parts` of equally many rows, stacked, one for each device.

    Every array gets a leading axis of `parts`. The outliers of each part are padded with zeros to the largest number of
    any part, and the permutation is repeated.

    Args:
      tensor: a concrete matrix `[out, in]`.
      parts: number of parts.

    Returns:
      A stack of matrices `[out / parts, in]`.

    Raises:
      SpqrError: a part would not have whole statistics groups, or the tensor is a stack already.

    Example:
      >>> parts = split_rows(packed, 2)
      >>> y = jnp.concatenate([spqr_matmul(x, jax.tree.map(lambda array: array[i], parts)) for i in range(2)], axis=-1)
      >>> bool(jnp.allclose(y, spqr_matmul(x, packed), atol=1e-4))
      True
    """
    if tensor.stack:
        raise SpqrError(f"a stack of {len(tensor.codes)} matrices cannot be split by rows; split each of them")
    out, _ = tensor.shape
    unit = rows_together(tensor)
    if parts < 1 or out % (parts * unit):
        groups = "" if unit == 1 else f" of whole statistics groups of {unit} rows"
        raise SpqrError(f"{out} output rows do not divide into {parts} parts{groups}")
    rows = out // parts
    return stack([slice_rows(tensor, start, start + rows) for start in range(0, out, rows)])


def join_rows(parts: SpqrTensor, out: int) -> SpqrTensor:
    """Inverse of `split_rows`: the matrices of a stack joined by rows, cut to the first `out`, outliers trimmed.

    Args:
      parts: a concrete stack of matrices.
      out: rows of the result; the rows after them are padding.

    Example:
      >>> joined = join_rows(split_rows(packed, 2), packed.shape[0])
      >>> bool((spqr_dequantize(joined) == spqr_dequantize(packed)).all())
      True
    """
    return slice_rows(concatenate_rows([element(parts, index) for index in range(len(parts.codes))]), 0, out)


def slice_rows(tensor: SpqrTensor, start: int, stop: int) -> SpqrTensor:
    """Rows `start` to `stop` of a concrete packed matrix; both are multiples of `rows_together`."""
    out, _ = tensor.shape
    pieces: dict[str, Any] = {
        name: array[..., start * array.shape[-2] // out : stop * array.shape[-2] // out, :]
        for name in ROW_FIELDS
        if (array := getattr(tensor, name)) is not None
    }
    outliers = None if tensor.outliers is None else tensor.outliers.slice_rows(start, stop)
    return replace(tensor, **pieces, outliers=outliers)


def rows_together(tensor: SpqrTensor) -> int:
    """Number of rows whose statistics are quantized together, so that they cannot be split."""
    levels = (tensor.scale_scale, tensor.zero_scale)
    return math.lcm(*(tensor.shape[0] // level.shape[-2] for level in levels if level is not None))


def _shared_by_rows(tensor: SpqrTensor) -> dict[str, Any]:
    """The properties that all rows of a matrix share, except the permutation."""
    return {
        "leading axes": tensor.stack,
        "input features": tensor.in_features,
        "bits": tensor.bits,
        "group size": tensor.group_size,
        "scales": _statistics_format(tensor.scale, tensor.scale_codes, tensor.scale_scale),
        "zeros": _statistics_format(tensor.zero, tensor.zero_codes, tensor.zero_scale),
    }


def _statistics_format(plain: Stored | None, planes: Stored | None, level: Stored | None) -> str:
    if plain is not None:
        return str(plain.dtype)
    assert planes is not None
    assert level is not None
    return f"{planes.shape[-3]} bits by {BLOCK * planes.shape[-2] // level.shape[-2]} rows in {level.dtype}"


def _equal(one: Stored | None, other: Stored | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or np.array_equal(one, other)


def _joined_arrays(arrays: Sequence[Any]) -> Any:
    """Joins NumPy arrays in host memory, because a device may not hold all matrices of a model twice."""
    module = np if all(isinstance(array, np.ndarray) for array in arrays) else jnp
    return module.concatenate(arrays, axis=-2)
