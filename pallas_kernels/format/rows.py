"""Rows of packed matrices put together and taken apart: fused projections, tensor parallelism.

Nothing is solved again: rows have their codes, statistics and outliers to themselves, and share only the permutation.
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
"""Arrays whose last axis but one follows the rows of the matrix, one by one or by the sixteen or the β2."""


def concatenate_rows(tensors: Sequence[SpqrTensor]) -> SpqrTensor:
    """Puts packed matrices `[out_i, in]` one above the other: ŵ = [ŵ_0; ŵ_1; …], exactly.

    Args:
      tensors: matrices with the same input features, permutation and format. The result has outliers where one of them
        has; padding of outliers is left out. Stacked matrices (leading axis) are joined element by element. They must
        be concrete: how many outliers there are decides the shapes of the result.

    Returns:
      `[Σ out_i, in]`.

    Raises:
      SpqrError: there are no matrices, or they differ in something that rows of one matrix share.

    Example:
      >>> queries_keys_values = spqr_matmul(x, concatenate_rows([q, k, v]))
    """
    if reason := why_not_one(tensors):
        raise SpqrError(reason)
    first = tensors[0]
    if first.codes.ndim > 3:
        elements = [[element(tensor, index) for tensor in tensors] for index in range(len(first.codes))]
        return stack([concatenate_rows(matrices) for matrices in elements])
    joined: dict[str, Any] = {
        name: _joined_arrays([getattr(tensor, name) for tensor in tensors])
        for name in ROW_FIELDS
        if getattr(first, name) is not None
    }
    return replace(first, **joined, outliers=join([(tensor.outliers, tensor.shape[0]) for tensor in tensors]))


def why_not_one(tensors: Sequence[SpqrTensor]) -> str | None:
    """What keeps `concatenate_rows` from joining matrices, in a sentence; None where nothing does.

    Example:
      >>> why_not_one([q, k])
      'matrices that differ in bits (3, 4) cannot be rows of one'
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

    Every array gets a leading axis of `parts`. The outliers of each part are padded with zeros to the most of any
    part, and the permutation is repeated.

    Args:
      tensor: a concrete matrix `[out, in]`.
      parts: number of parts.

    Returns:
      A stack of matrices `[out / parts, in]`.

    Raises:
      SpqrError: the rows do not divide into parts, or not between two statistics groups; or it is a stack already.

    Example:
      >>> def rows(x, part):  # a device's slice keeps the leading axis, of length 1
      ...     return spqr_matmul(x, jax.tree.map(lambda array: array[0], part))
      >>> over = jax.shard_map(rows, mesh=mesh, in_specs=(P(), P("model")), out_specs=P(None, "model"))
      >>> parts = jax.device_put(split_rows(w, 4), NamedSharding(mesh, P("model")))
      >>> y = over(x, parts)  # spqr_matmul(x, w)
    """
    if tensor.codes.ndim > 3:
        raise SpqrError(f"a stack of {len(tensor.codes)} matrices cannot be split by rows; split each of them")
    out, _ = tensor.shape
    unit = rows_together(tensor)
    if parts < 1 or out % (parts * unit):
        groups = "" if unit == 1 else f" of whole statistics groups of {unit} rows"
        raise SpqrError(f"{out} output rows do not divide into {parts} parts{groups}")
    rows = out // parts
    return stack([slice_rows(tensor, start, start + rows) for start in range(0, out, rows)])


def join_rows(parts: SpqrTensor, out: int) -> SpqrTensor:
    """Inverse of `split_rows`: the first `out` rows of a stack's matrices one above the other, outliers trimmed.

    Args:
      parts: a concrete stack of matrices.
      out: rows of the result; what follows them was padding.

    Example:
      >>> join_rows(split_rows(w, 4), w.shape[0])  # w
    """
    return slice_rows(concatenate_rows([element(parts, index) for index in range(len(parts.codes))]), 0, out)


def slice_rows(tensor: SpqrTensor, start: int, stop: int) -> SpqrTensor:
    """Rows `start` to `stop` of a concrete packed matrix: whole statistics groups of it, see `rows_together`."""
    out, _ = tensor.shape
    pieces: dict[str, Any] = {
        name: array[..., start * array.shape[-2] // out : stop * array.shape[-2] // out, :]
        for name in ROW_FIELDS
        if (array := getattr(tensor, name)) is not None
    }
    outliers = None if tensor.outliers is None else tensor.outliers.slice_rows(start, stop)
    return replace(tensor, **pieces, outliers=outliers)


def rows_together(tensor: SpqrTensor) -> int:
    """Rows whose statistics are quantized together, which cannot be taken apart."""
    levels = (tensor.scale_scale, tensor.zero_scale)
    return math.lcm(*(tensor.shape[0] // len(level) for level in levels if level is not None))


def _shared_by_rows(tensor: SpqrTensor) -> dict[str, Any]:
    """What all rows of one matrix have in common, but for the permutation."""
    return {
        "leading axes": tensor.codes.shape[:-3],
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
    """Joined where they are: a device may not have room for all matrices of a model twice."""
    module = np if all(isinstance(array, np.ndarray) for array in arrays) else jnp
    return module.concatenate(arrays, axis=-2)
