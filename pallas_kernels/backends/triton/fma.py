"""One token: every thread multiplies and adds on its own.

A thread loads neighbouring words of codes at once. It keeps the activations and the codes of the statistics in
registers from row to row of a set. XLA adds the partial sums, one per row and tile of columns.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.backends.triton.arrange import arrange
from pallas_kernels.backends.triton.code_pairs import code_pairs
from pallas_kernels.backends.triton.instructions import (
    Pair,
    halves,
    multiply_add,
    pair_add,
    pair_multiply,
    pair_multiply_add,
)
from pallas_kernels.backends.triton.launch import Launch
from pallas_kernels.backends.triton.outliers import shares, sparse_launch, sparse_part, sparse_programs
from pallas_kernels.backends.triton.parts import first_and_rest
from pallas_kernels.backends.triton.results import result
from pallas_kernels.backends.triton.statistics import Halves, inside, real, statistics
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.tiles import DEFAULT, Tile

AT_ONCE = 1
"""Tokens of a program."""


def fma_matmul(
    x: Float[Array, "tokens in"], w: SpqrTensor, *, tile: Tile = DEFAULT["fma"], interpret: bool
) -> Float[Array, "tokens out"]:
    """y = x ŵᵀ, where each program treats one token.

    With bfloat16 x, the products of half a group are summed in float16, which is as exact as x. Other products and all
    further sums are in float32.
    """
    arranged = arrange(x, w, columns=tile.columns, pairs=x.dtype == jnp.bfloat16, interpret=interpret)
    tokens, out = x.shape[0], w.shape[0]
    tiles = arranged.values.shape[-1] // tile.columns
    sums = pl.pallas_call(
        functools.partial(_kernel, tile=tile, interpret=interpret),
        out_shape=result((tiles + shares(w, AT_ONCE), tokens, out), jnp.float32, (x, w)),
        grid=(tiles * tile.blocks(out) + sparse_programs(w, AT_ONCE), tokens),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="spqr_fma",
    )(arranged, w)
    return sums.sum(0).astype(x.dtype)


def launch(w: SpqrTensor, tokens: int, tile: Tile) -> Launch:
    """The loops of the kernel, which treats one token."""
    return sparse_launch(w, tokens, AT_ONCE)


def _kernel(x: Any, w: Any, out_ref: Any, *, tile: Tile, interpret: bool) -> None:
    tiles = x.values.shape[-1] // tile.columns
    token = pl.program_id(1)
    dense = functools.partial(_dense_part, x, w, out_ref, token=token, tiles=tiles, tile=tile, interpret=interpret)
    sparse = functools.partial(sparse_part, x.ordered, w, out_ref, block=token, at_once=AT_ONCE, interpret=interpret)
    first_and_rest(tiles * tile.blocks(w.shape[0]), dense, None if w.outliers is None else sparse)


def _dense_part(
    x: Any, w: Any, out_ref: Any, program: Array, *, token: Array, tiles: int, tile: Tile, interpret: bool
) -> None:
    bits, out, words = w.codes.shape
    sets, count = tile.sets, tile.rows
    # Tiles first: then programs that run on a processor at the same time mostly read the same activations.
    number = program % tiles
    first = (program // tiles * sets + jnp.arange(sets)) * count
    column = number * tile.columns + jnp.arange(tile.columns)
    columns = inside(column, words, sets, tile.columns)
    # Issue these loads first: global memory has the longest latency.
    words_of_rows = []
    for r in range(count):
        rows = first + r
        mask = real(columns, rows, out, sets * count)
        # Masked-off codes may be anything, because their activations are zero.
        words_of_rows.append([plgpu.load(w.codes.at[k, rows[:, None], column[None]], mask=mask) for k in range(bits)])

    def of_x(array: Any, *place: int) -> Array:
        # Broadcast the addresses to all sets, so that values have the layout of the codes.
        of_all_sets = jnp.broadcast_to(column[None], (sets, tile.columns))
        return plgpu.load(array.at[(token, *map(jnp.int32, place), of_all_sets)])

    splits = x.sums.shape[2]
    groups = statistics(
        w,
        column,
        rows=first,
        count=count,
        columns=columns,
        scale_factor=[of_x(x.factors, half) for half in range(2)],
        zero_factors=[[-of_x(x.sums, half, split) for half in range(2)] for split in range(splits)],
        interpret=interpret,
    )
    values: Any
    if x.values.dtype == jnp.uint32:
        values = [of_x(x.values, j) for j in range(BLOCK)]
        products = functools.partial(_products_in_float16, values=values, interpret=interpret)
    else:
        values = [[of_x(x.values, half, j) for j in range(BLOCK)] for half in range(2)]
        products = functools.partial(_products_in_float32, values=values, interpret=interpret)

    for r in range(count):
        codes = code_pairs(words_of_rows[r])
        total: Any = None
        for split, (scale, zero) in enumerate(groups):
            places = range(split * BLOCK // splits, (split + 1) * BLOCK // splits)
            for product, s in zip(products(codes, places, zero(r)), scale(r), strict=True):
                total = s * product if total is None else multiply_add(s, product, total, interpret=interpret)
        rows = first + r
        plgpu.store(out_ref.at[number, token, rows], total.sum(axis=1), mask=rows < out)


def _products_in_float16(
    code: Callable[[int], Pair], places: range, start: Halves, *, values: list[Pair], interpret: bool
) -> Halves:
    """Σ q · x + start for the groups of either half, the products of half a group summed in float16."""
    quarter = len(places) // 4
    sums = []
    for begin in places[::quarter]:
        total = pair_multiply(code(begin), values[begin], interpret=interpret)
        for j in range(begin + 1, begin + quarter):
            total = pair_multiply_add(code(j), values[j], total, interpret=interpret)
        sums.append(total)
    parts = [halves(pair_add(*two, interpret=interpret)) for two in (sums[:2], sums[2:])]
    return [sum((part[half].astype(jnp.float32) for part in parts), start[half]) for half in range(2)]


def _products_in_float32(
    code: Callable[[int], Pair], places: range, start: Halves, *, values: list[Halves], interpret: bool
) -> Halves:
    """Σ q · x + start for the groups of either half, summed in float32."""
    totals = list(start)
    for j in places:
        for half, number in enumerate(halves(code(j))):
            totals[half] = multiply_add(number.astype(jnp.float32), values[half][j], totals[half], interpret=interpret)
    return totals
