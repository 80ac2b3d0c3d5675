"""Scales and zeros of the rows of a thread, for the groups in the low and in the high half of code words."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.backends.triton.code_pairs import MANTISSA, UNIT, planes_pair
from pallas_kernels.backends.triton.instructions import halves, multiply_add, pair_multiply, subtract_product, twice
from pallas_kernels.backends.triton.layouts import by_fours
from pallas_kernels.format.bit_layout import BLOCK

Halves = list[Float[Array, "sets columns"]]
"""A number of the block in the low half, and one of the block in the high half."""

Statistic = Callable[[int], Halves]
"""A statistic of row `rows + r` in the group of either half, as a function of r."""


def statistics(
    w: Any,
    column: Int[Array, " columns"],
    *,
    rows: Int[Array, " sets"],
    count: int,
    columns: Bool[Array, "sets columns"] | None,
    scale_factor: Halves | float = 1.0,
    zero_factors: Sequence[Halves | float] = (1.0, 1.0),
    zero_term: float = 0.0,
    interpret: bool,
) -> list[tuple[Statistic, Statistic]]:
    """factor · scale and factor · zero + term of each group within a block of these code words.

    Args:
      w: an `SpqrTensor` of references to its arrays.
      column: the code words.
      rows: first row of each set of `count` rows; a set lies within the sixteen rows that share words of planes.
      count: rows of a set.
      columns: mask of the code words that exist; None if all do.
      scale_factor: factor of every scale.
      zero_factors: factors of the zeros, one for each group of a block.
      zero_term: added to every zero.
    """
    words, out = w.codes.shape[2], w.codes.shape[1]
    result = []
    for split in range(groups_per_block(w.group_size)):
        groups = [group_of(half * words + column, split, w) for half in range(2)]
        of_rows = functools.partial(
            _statistic, rows=rows, count=count, groups=groups, columns=columns, out=out, interpret=interpret
        )
        scale = of_rows(w.scale, w.scale_codes, w.scale_scale, w.scale_zero, factor=scale_factor)
        zero = of_rows(w.zero, w.zero_codes, w.zero_scale, w.zero_zero, factor=zero_factors[split], term=zero_term)
        result.append((scale, zero))
    return result


def groups_per_block(group_size: int) -> int:
    """Groups within a block; 1 where a group is a block or more."""
    return max(1, BLOCK // group_size)


def inside(column: Int[Array, " columns"], words: int, sets: int, tile: int) -> Bool[Array, "sets columns"] | None:
    """Mask of the columns that exist, in programs of `tile` columns.

    None if all exist, because a mask costs instructions even where it is true everywhere.
    """
    if words % tile == 0:
        return None
    return jnp.broadcast_to((column < words)[None], (sets, column.shape[0]))


def real(
    columns: Bool[Array, "sets columns"] | None, row: Int[Array, " sets"], out: int, rows_per_program: int
) -> Bool[Array, "sets #columns"] | None:
    """Mask of the code words that exist: existing columns, rows below `out`; None if all do."""
    if out % rows_per_program == 0:
        return columns
    rows = (row < out)[:, None]
    return rows if columns is None else jnp.broadcast_to(rows, columns.shape) & columns


def _statistic(
    plain: Any,
    planes: Any,
    second_scale: Any,
    second_zero: Any,
    *,
    factor: Halves | float,
    term: float = 0.0,
    rows: Int[Array, " sets"],
    count: int,
    groups: Sequence[Int[Array, " columns"]],
    columns: Bool[Array, "sets columns"] | None,
    out: int,
    interpret: bool,
) -> Statistic:
    """factor · statistic + term, from references to the fields of scale or zero in an `SpqrTensor`.

    `groups` has one entry for each half.
    """
    factors: Any = factor if isinstance(factor, list) else [factor, factor]
    mask = real(columns, rows, out, rows.shape[0] * count)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (rows.shape[0], groups[0].shape[0]))

    def read(array: Any, *place: Array) -> list[Array]:
        return [
            plgpu.load(array.at[(*place, group[None])], mask=mask, other=None if mask is None else 0)
            for group in groups
        ]

    if plain is not None:

        def unquantized(r: int) -> Halves:
            values = read(plain, jnp.minimum(rows + r, out - 1)[:, None])
            return [value.astype(jnp.float32) * f + term for value, f in zip(values, factors, strict=True)]

        return unquantized

    bits, sixteenths, _ = planes.shape
    stats_group = (rows // (sixteenths * BLOCK // second_scale.shape[0]))[:, None]
    scales, zeros = (read(array, stats_group) for array in (second_scale, second_zero))
    slopes = [scale.astype(jnp.float32) * f for scale, f in zip(scales, factors, strict=True)]
    intercepts = [
        subtract_product(jnp.float32(term), slope, zero.astype(jnp.float32), interpret=interpret)
        for slope, zero in zip(slopes, zeros, strict=True)
    ]
    slopes = [slope * 2.0**UNIT for slope in slopes]
    shift = (rows % BLOCK).astype(jnp.uint32)[:, None]
    words = []
    for k in range(bits):
        low, high = read(planes, jnp.int32(k), (rows // BLOCK)[:, None])
        words.append((low.astype(jnp.uint32) | high.astype(jnp.uint32) << 16) >> shift)
    return _quantized(words, slopes, intercepts, interpret=interpret)


def _quantized(
    words: Sequence[UInt32[Array, "sets columns"]], slopes: Halves, intercepts: Halves, *, interpret: bool
) -> Statistic:
    """2^(−UNIT) · slope · code + intercept, from bit planes of codes whose lowest bit is that of a set's first row."""
    rows_in_mantissa = MANTISSA + 1 - len(words)

    @functools.cache
    def shifted(base: int) -> list[Array]:
        return [word >> (base - k) if base > k else word << (k - base) for k, word in enumerate(words)]

    def quantized(r: int) -> Halves:
        position = r % rows_in_mantissa
        codes = planes_pair(shifted(r - position), position)
        if position:
            codes = pair_multiply(codes, jnp.uint32(twice(2.0**-position)), interpret=interpret)
        return [
            multiply_add(code.astype(jnp.float32), slope, intercept, interpret=interpret)
            for code, slope, intercept in zip(halves(codes), slopes, intercepts, strict=True)
        ]

    return quantized


def group_of(block: Int[Array, " columns"], split: int, w: Any) -> Int[Array, " columns"]:
    """Group of a block of codes, or of one of its splits where a block has several groups."""
    if w.group_size < BLOCK:
        group = block * (BLOCK // w.group_size) + split
    else:
        group = by_fours(jax.lax.div(block, jnp.int32(w.group_size // BLOCK)))
    if w.in_features == 2 * w.codes.shape[2] * BLOCK:
        return group
    # Clamp where the last block is missing or incomplete: memory beside the statistics can hold NaN, also times 0.
    return jnp.minimum(group, w.in_features // w.group_size - 1)
