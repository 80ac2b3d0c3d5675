"""Activations prepared for the kernels: in quantization order, by blocks, scaled for float16 arithmetic."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.backends.triton.code_pairs import UNIT, positions
from pallas_kernels.backends.triton.instructions import join
from pallas_kernels.backends.triton.parts import first_and_rest
from pallas_kernels.backends.triton.results import result
from pallas_kernels.backends.triton.statistics import groups_per_block
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.tensor import SpqrTensor

LARGEST = 15
"""Activations in float16 are scaled to lie below 2^LARGEST."""
COLUMNS = 8
"""Code words of a program without tensor cores: few, so that there are many programs."""
FEATURES = 64
"""Features of a program that orders x for outliers, for several tokens, which are neighbours in the result."""


class Arranged(NamedTuple):
    """x, scaled by a power of two f; columns are code words, padded with zeros to whole tiles.

    Attributes:
      ordered: x itself in quantization order, for outliers; None where the matrix has none.
      values: x · f · 2^(−p) for code j, which the kernel holds as q · 2^(p − UNIT). Either float32, or pairs of float16
        for the blocks in the low and in the high half of the code words. For the tensor cores, the tokens of the
        columns of one product are neighbours.
      sums: Σ x · f · 2^(−UNIT) over the codes of a group in each block of either half.
      factors: 2^UNIT / f.
    """

    ordered: Float[Array, "in tokens"] | None
    values: (
        Float[Array, "tokens 2 16 columns"]
        | UInt32[Array, "tokens 16 columns"]
        | UInt32[Array, "blocks 16 tokens together"]
    )
    sums: Float[Array, "tokens 2 groups_per_block columns"]
    factors: Float[Array, "tokens 2 columns"]


def arrange(
    x: Float[Array, "tokens in"],
    w: SpqrTensor,
    *,
    columns: int,
    pairs: bool,
    together: int | None = None,
    interpret: bool,
) -> Arranged:
    """Reads x through the permutation, scales it, and sums it over each group.

    Args:
      x: activations.
      w: the packed weight.
      columns: code words in a tile.
      pairs: True for values in float16, with f such that the largest value of a block, or of a tile, is just below
        2^LARGEST. False for float32, with f = 2^UNIT.
      together: code words in one product of the tensor cores; None without them. With them, a tile has one f.
      interpret: True to run the kernel as XLA operations.
    """
    tokens, padded = x.shape[0], pl.cdiv(w.codes.shape[2], columns) * columns
    if together is None:
        columns = min(columns, COLUMNS)

    def output(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return result(sizes, dtype, (x, w.permutation))

    if together is not None:
        values = output(padded // together, BLOCK, tokens, together, dtype=jnp.uint32)
    elif pairs:
        values = output(tokens, BLOCK, padded, dtype=jnp.uint32)
    else:
        values = output(tokens, 2, BLOCK, padded)
    programs, ordering = padded // columns * tokens, 0
    if w.outliers is not None:
        ordering = pl.cdiv(w.in_features, FEATURES) * pl.cdiv(tokens, tokens_at_once(tokens))
    kernel = functools.partial(_kernel, w=w, columns=columns, together=together, programs=programs, interpret=interpret)
    return pl.pallas_call(
        kernel,
        out_shape=Arranged(
            output(*x.shape[::-1], dtype=x.dtype) if ordering else None,
            values,
            output(tokens, 2, groups_per_block(w.group_size), padded),
            output(tokens, 2, padded),
        ),
        grid=(programs + ordering,),
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="spqr_arrange",
    )(x, w.permutation)


def tokens_at_once(tokens: int) -> int:
    """Tokens of a program: 1, or the 16 of a tensor core product, or a multiple of these."""
    return 1 if tokens == 1 else 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def _kernel(x: Any, permutation: Any, *results: Any, w: SpqrTensor, programs: int, **options: Any) -> None:
    arranged: Any = Arranged(*results)
    tiles = programs // x.shape[0]

    def read(place: Array, token: Array, real: Array) -> Array:
        feature = place
        if permutation is not None:
            known = place < w.in_features
            feature = plgpu.load(permutation.at[place], mask=known, other=0).astype(jnp.int32)
        return plgpu.load(x.at[token, feature], mask=real, other=0)

    def arrange_tile(number: Array) -> None:
        _arrange_tile(arranged, read, number % tiles, number // tiles, w, **options)

    order = functools.partial(_order, arranged.ordered, read)
    first_and_rest(programs, arrange_tile, None if arranged.ordered is None else order)


def _order(ordered: Any, read: Callable[..., Array], number: Array) -> None:
    """Writes features of several tokens in quantization order."""
    features, tokens = ordered.shape
    at_once = tokens_at_once(tokens)
    blocks = pl.cdiv(tokens, at_once)
    place = (number // blocks * FEATURES + jnp.arange(FEATURES))[:, None]
    token = (number % blocks * at_once + jnp.arange(at_once))[None]
    real = (place < features) & (token < tokens)
    # Interpreted, a masked store writes back what it read. Point it outside the array, where no program writes.
    plgpu.store(ordered.at[jnp.minimum(place, features), token], read(place, token, real), mask=real)


def _arrange_tile(
    arranged: Any,
    read: Callable[..., Array],
    tile: Array,
    token: Array,
    w: SpqrTensor,
    *,
    columns: int,
    together: int | None,
    interpret: bool,
) -> None:
    words = w.codes.shape[2]
    column = tile * columns + jnp.arange(columns)

    def value(half: int, j: int) -> Array:
        place = (half * words + column) * BLOCK + j
        return read(place, token, (column < words) & (place < w.in_features)).astype(jnp.float32)

    values = [[value(half, j) for j in range(BLOCK)] for half in range(2)]
    pairs = arranged.values.dtype == jnp.uint32
    scales = [_power(jnp.full(columns, UNIT))] * 2
    if pairs:
        largest = [functools.reduce(jnp.maximum, map(jnp.abs, block)) for block in values]
        if together is not None:
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
        code = jnp.int32(j)
        if together is not None:
            at = arranged.values.at[column // together, code, token, column % together]
            plgpu.store(at, join(low, high, interpret=interpret))
        elif pairs:
            plgpu.store(arranged.values.at[token, code, column], join(low, high, interpret=interpret))
        else:
            plgpu.store(arranged.values.at[token, jnp.int32(0), code, column], low)
            plgpu.store(arranged.values.at[token, jnp.int32(1), code, column], high)


def _scale_below(size: Float[Array, " columns"]) -> Float[Array, " columns"]:
    """The power of two that scales sizes to just below 2^LARGEST."""
    exponent = (jax.lax.bitcast_convert_type(size, jnp.int32) >> 23) - 126
    # 2^UNIT / scale must be finite too.
    return _power(jnp.clip(LARGEST - exponent, UNIT - 127, 127))


def _power(exponent: Int[Array, " columns"]) -> Float[Array, " columns"]:
    """2^exponent in float32."""
    return jax.lax.bitcast_convert_type((exponent + 127).astype(jnp.int32) << 23, jnp.float32)
