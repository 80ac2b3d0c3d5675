"""Activations as the kernels meet them: read through the permutation, by blocks, scaled for float16 arithmetic."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.packing import BLOCK
from pallas_kernels.tensor import SpqrTensor
from pallas_kernels.triton.code_pairs import UNIT, positions
from pallas_kernels.triton.instructions import join
from pallas_kernels.triton.results import result
from pallas_kernels.triton.statistics import groups_per_block

LARGEST = 15
"""Activations in float16 are scaled to lie below 2^LARGEST."""


COLUMNS = 8
"""Code words that a program arranges where it is free to choose: few, for then there are many programs."""


class Arranged(NamedTuple):
    """x, scaled by a power of two f; columns are code words, padded with zeros to whole tiles.

    Attributes:
      ordered: x itself, in quantization order, for outliers alone; None where the matrix has none.
      values: x · f · 2^(−p) for code j, which the kernel holds as q · 2^(p − UNIT); in float32, or as pairs of float16
        of the blocks in the low and in the high half of the code words.
      sums: Σ x · f · 2^(−UNIT) over the codes of a group in each block of either half.
      factors: 2^UNIT / f.
    """

    ordered: Float[Array, "in tokens"] | None
    values: Float[Array, "tokens 2 16 columns"] | UInt32[Array, "tokens 16 columns"]
    sums: Float[Array, "tokens 2 groups_per_block columns"]
    factors: Float[Array, "tokens 2 columns"]


def arrange(
    x: Float[Array, "tokens in"], w: SpqrTensor, *, columns: int, pairs: bool, by_tile: bool = False, interpret: bool
) -> Arranged:
    """Reads x through the permutation.

    Args:
      columns: code words in a tile.
      pairs: values in float16, with f such that the largest of a block, or of a tile, is just below 2^LARGEST;
        otherwise in float32, with f = 2^UNIT.
      by_tile: one f for a tile.
    """
    tokens, padded = x.shape[0], pl.cdiv(w.codes.shape[2], columns) * columns
    if not by_tile:
        columns = min(columns, COLUMNS)

    def output(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return result((tokens, *sizes, padded), dtype, (x, w.permutation))

    ordered: Any = None if w.row_offsets is None else result(x.shape[::-1], x.dtype, (x, w.permutation))
    return pl.pallas_call(
        functools.partial(_kernel, w=w, columns=columns, by_tile=by_tile, interpret=interpret),
        out_shape=Arranged(
            ordered,
            output(BLOCK, dtype=jnp.uint32) if pairs else output(2, BLOCK),
            output(2, groups_per_block(w.group_size)),
            output(2),
        ),
        grid=(padded // columns, tokens),
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="spqr_arrange",
    )(x, w.permutation)


def _kernel(
    x_ref: Any, permutation_ref: Any, *result_refs: Any, w: SpqrTensor, columns: int, by_tile: bool, interpret: bool
) -> None:
    arranged: Any = Arranged(*result_refs)
    token, words = pl.program_id(1), w.codes.shape[2]
    column = pl.program_id(0) * columns + jnp.arange(columns)

    def read(half: int, j: int) -> tuple[Array, Array]:
        place = (half * words + column) * BLOCK + j
        real = (column < words) & (place < w.in_features)
        feature = place
        if permutation_ref is not None:
            feature = plgpu.load(permutation_ref.at[place], mask=real, other=0).astype(jnp.int32)
        # Interpreted, a masked store writes what it has read: beside the array, where nothing else is written.
        return plgpu.load(x_ref.at[token, feature], mask=real, other=0), jnp.where(real, place, w.in_features)

    read_values = [[read(half, j) for j in range(BLOCK)] for half in range(2)]
    if arranged.ordered is not None:
        # Not one by one: a load after a store would wait for it, for it could be from the same place.
        for value, place in itertools.chain(*read_values):
            plgpu.store(arranged.ordered.at[place, token], value, mask=place < w.in_features)
    values = [[value.astype(jnp.float32) for value, _ in block] for block in read_values]
    pairs = arranged.values.dtype == jnp.uint32
    scales = [_power(jnp.full(columns, UNIT))] * 2
    if pairs:
        largest = [functools.reduce(jnp.maximum, map(jnp.abs, block)) for block in values]
        if by_tile:
            largest = [jnp.broadcast_to(jnp.max(jnp.maximum(*largest)), (columns,))] * 2
        scales = [_scale_below(size) for size in largest]
    for half, scale in enumerate(scales):
        values[half] = [value * scale for value in values[half]]
        plgpu.store(arranged.factors.at[token, jnp.int32(half), column], 2.0**UNIT / scale)
        per_group = BLOCK // arranged.sums.shape[2]
        for split in range(arranged.sums.shape[2]):
            total = functools.reduce(jnp.add, values[half][split * per_group : (split + 1) * per_group])
            plgpu.store(arranged.sums.at[token, jnp.int32(half), jnp.int32(split), column], total * 2.0**-UNIT)
    for j, position in enumerate(positions(w.bits)):
        low, high = (block[j] * 2.0**-position for block in values)
        if pairs:
            plgpu.store(arranged.values.at[token, jnp.int32(j), column], join(low, high, interpret=interpret))
        else:
            plgpu.store(arranged.values.at[token, jnp.int32(0), jnp.int32(j), column], low)
            plgpu.store(arranged.values.at[token, jnp.int32(1), jnp.int32(j), column], high)


def _scale_below(size: Float[Array, " columns"]) -> Float[Array, " columns"]:
    """The power of two that brings sizes just below 2^LARGEST."""
    exponent = (jax.lax.bitcast_convert_type(size, jnp.int32) >> 23) - 126
    # 2^UNIT divided by it must be finite too.
    return _power(jnp.clip(LARGEST - exponent, UNIT - 127, 127))


def _power(exponent: Int[Array, " columns"]) -> Float[Array, " columns"]:
    """2^exponent in float32."""
    return jax.lax.bitcast_convert_type((exponent + 127).astype(jnp.int32) << 23, jnp.float32)
