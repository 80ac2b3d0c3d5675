"""2 to 128 tokens: weights are dequantized to float16 in registers, for the tensor cores.

The rows of a set share the codes of their statistics. One tensor core product takes code j of the blocks in both halves
of the words, because the tensor cores read pairs of float16. XLA adds the partial sums, one per row, token and tile of
columns.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float16

from pallas_kernels.backends.triton.arrange import arrange, tokens_at_once
from pallas_kernels.backends.triton.code_pairs import UNIT, code_pairs, positions
from pallas_kernels.backends.triton.instructions import Pair, halves, join, pair_multiply, pair_multiply_add, twice
from pallas_kernels.backends.triton.launch import Launch
from pallas_kernels.backends.triton.outliers import shares, sparse_launch, sparse_part, sparse_programs
from pallas_kernels.backends.triton.parts import first_and_rest
from pallas_kernels.backends.triton.results import result
from pallas_kernels.backends.triton.statistics import inside, real, statistics
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.tiles import DEFAULT, Tile

NEIGHBOURS = 2 if jax.__version_info__ < (0, 11) else 1
"""Neighbouring pairs that a thread passes to a tensor core; the compiler that comes with JAX decides."""
NORMAL = 15
"""Codes q · 2^(p − UNIT) are multiplied by 2^NORMAL, the largest power of two in float16."""
SMALLER = 4
"""Weights are computed times 2^−SMALLER, so that scales up to 2000 do not overflow."""
SLOPE = UNIT - NORMAL - SMALLER
"""Scales are computed times 2^SLOPE: times a code times 2^NORMAL, this gives a weight times 2^(p − SMALLER)."""


def mma_matmul(
    x: Float[Array, "tokens in"], w: SpqrTensor, *, tile: Tile = DEFAULT["mma"], interpret: bool
) -> Float[Array, "tokens out"]:
    """y = x ŵᵀ with products in float16 and sums in float32."""
    columns, at_once = tile.columns * tile.steps, _at_once(x.shape[0])
    arranged = arrange(x, w, columns=columns, pairs=True, together=tile.columns, interpret=interpret)
    tokens, out = x.shape[0], w.shape[0]
    tiles = arranged.factors.shape[-1] // columns
    sums = pl.pallas_call(
        functools.partial(_kernel, tile=tile, at_once=at_once, interpret=interpret),
        out_shape=result((tiles + shares(w, at_once), tokens, out), jnp.float32, (x, w)),
        grid=(tiles * tile.blocks(out) + sparse_programs(w, at_once), pl.cdiv(tokens, at_once)),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="spqr_mma",
    )(arranged, w)
    return sums.sum(0).astype(x.dtype)


def launch(w: SpqrTensor, tokens: int, tile: Tile) -> Launch:
    """The loops of the kernel, which treats a block of tokens at once."""
    return replace(sparse_launch(w, tokens, _at_once(tokens)), steps=tile.steps)


def _at_once(tokens: int) -> int:
    """Tokens of a program."""
    return max(16, tokens_at_once(tokens))


def _kernel(x: Any, w: Any, out_ref: Any, *, tile: Tile, at_once: int, interpret: bool) -> None:
    tiles = x.factors.shape[-1] // (tile.columns * tile.steps)
    options: Any = {"block": pl.program_id(1), "at_once": at_once, "interpret": interpret}
    dense = functools.partial(_dense_part, x, w, out_ref, tiles=tiles, tile=tile, **options)
    sparse = functools.partial(sparse_part, x.ordered, w, out_ref, **options)
    first_and_rest(tiles * tile.blocks(w.shape[0]), dense, None if w.outliers is None else sparse)


def _dense_part(
    x: Any,
    w: Any,
    out_ref: Any,
    program: Array,
    *,
    block: Array,
    tiles: int,
    tile: Tile,
    at_once: int,
    interpret: bool,
) -> None:
    tokens, out = x.factors.shape[0], w.shape[0]
    # Tiles first: then programs that run on a processor at the same time mostly read the same activations.
    number = program % tiles
    first = (program // tiles * tile.sets + jnp.arange(tile.sets)) * tile.rows
    token = block * at_once + jnp.arange(at_once)
    known = token < tokens

    def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns = number * tile.steps + i
        column = columns * tile.columns + jnp.arange(tile.columns)
        weights = [_weights(w, first, r, column, tile=tile, interpret=interpret) for r in range(tile.rows)]
        for j in range(BLOCK):
            at = x.values.at[columns, jnp.int32(j), token[:, None], jnp.arange(tile.columns)[None]]
            values = plgpu.load(at, mask=jnp.broadcast_to(known[:, None], (at_once, tile.columns)), other=0)
            values = _side_by_side(values)
            sums = tuple(
                total + plgpu.dot(_side_by_side(weight(j)), values, trans_b=True)
                for total, weight in zip(sums, weights, strict=True)
            )
        return sums

    sums = jax.lax.fori_loop(0, tile.steps, step, (jnp.zeros((tile.sets, at_once), jnp.float32),) * tile.rows)
    factor = plgpu.load(x.factors.at[token, jnp.int32(0), number * tile.steps * tile.columns], mask=known, other=0)
    factor = factor * 2.0 ** (SMALLER - UNIT)
    for r, total in enumerate(sums):
        row = first + r
        at = out_ref.at[number, token[None], row[:, None]]
        plgpu.store(at, total * factor[None], mask=known[None] & (row < out)[:, None])


def _weights(w: Any, first: Array, r: int, column: Array, *, tile: Tile, interpret: bool) -> Callable[[int], Pair]:
    """Weights of row `first + r` of each set at code j of the words' blocks, times 2^(p_j − SMALLER), by j."""
    bits, out, words = w.codes.shape
    columns = inside(column, words, tile.sets, tile.columns * tile.steps)
    center = 2 ** (bits - 1)
    multiply = functools.partial(pair_multiply, interpret=interpret)
    # ŵ = s (q − z) = s (q − center) + s (center − z): the second term is small, and so is its rounding to float16.
    groups = statistics(
        w,
        column,
        rows=first,
        count=tile.rows,
        columns=columns,
        scale_factor=2.0**SLOPE,
        zero_factors=(-1.0, -1.0),
        zero_term=center,
        interpret=interpret,
    )
    slopes, intercepts = [], []
    for scale, zero in groups:
        slopes.append(join(*scale(r), interpret=interpret))
        offsets = (s * z for s, z in zip(scale(r), zero(r), strict=True))
        intercepts.append(join(*offsets, interpret=interpret))
    row = first + r
    mask = real(columns, row, out, tile.sets * tile.rows)
    code = code_pairs([plgpu.load(w.codes.at[k, row[:, None], column[None]], mask=mask) for k in range(bits)])

    @functools.cache
    def intercept(split: int, position: int) -> Pair:
        return multiply(intercepts[split], jnp.uint32(twice(2.0 ** (position - SLOPE - SMALLER))))

    def weight(j: int) -> Pair:
        split, position = j * len(groups) // BLOCK, positions(bits)[j]
        minus_center = jnp.uint32(twice(-center * 2.0 ** (position + NORMAL - UNIT)))
        centered = pair_multiply_add(code(j), jnp.uint32(twice(2.0**NORMAL)), minus_center, interpret=interpret)
        return pair_multiply_add(centered, slopes[split], intercept(split, position), interpret=interpret)

    return weight


def _side_by_side(pairs: Pair) -> Float16[Array, "rows numbers"]:
    """The numbers of each pair interleaved, and pairs in the order in which threads hold them.

    A thread loads four neighbouring words of a row. The tensor cores expect `NEIGHBOURS` pairs of it, and the next
    pairs at a distance of four threads. The order of a sum is free, so words are renamed and no data moves: 4.0 instead
    of 6.3 instructions per weight.
    """
    rows, columns = pairs.shape
    numbers = jnp.stack(halves(pairs), axis=-1)
    parts = numbers.reshape(rows, columns // 4, NEIGHBOURS, 4 // NEIGHBOURS, 2)
    return parts.transpose(0, 3, 1, 2, 4).reshape(rows, 2 * columns)
