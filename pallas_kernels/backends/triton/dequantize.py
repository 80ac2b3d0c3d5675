"""Many tokens: a kernel writes the dense weight once, and XLA multiplies."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends.triton.code_pairs import UNIT, code_pairs, positions
from pallas_kernels.backends.triton.instructions import halves, multiply_add
from pallas_kernels.backends.triton.launch import Launch
from pallas_kernels.backends.triton.outliers import add_outliers
from pallas_kernels.backends.triton.results import result
from pallas_kernels.backends.triton.statistics import inside, real, statistics
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.tiles import DEFAULT, Tile


def dequantize_matrix(
    w: SpqrTensor, dtype: DTypeLike, *, tile: Tile = DEFAULT["dequantize"], interpret: bool
) -> Float[Array, "in out"]:
    """ŵᵀ, its rows in the order of the input features.

    The permutation costs nothing: it is the address of a row, and a program writes whole memory transactions of it.
    Permuting many activations instead would take nearly as long as this kernel.
    """
    dense: Any = pl.pallas_call(
        functools.partial(_kernel, tile=tile, interpret=interpret),
        out_shape=result(w.shape[::-1], dtype, w),
        grid=(pl.cdiv(w.codes.shape[2], tile.columns), tile.blocks(w.shape[0])),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="spqr_dequantize",
    )(w)
    return dense if w.outliers is None else add_outliers(dense, w, interpret=interpret)


def launch(w: SpqrTensor, tokens: int, tile: Tile) -> Launch:
    """The launch, which has no loops for any number of tokens."""
    return Launch()


def _kernel(w: Any, out_ref: Any, *, tile: Tile, interpret: bool) -> None:
    _, out, words = w.codes.shape
    sets, count = tile.sets, tile.rows
    column = pl.program_id(0) * tile.columns + jnp.arange(tile.columns)
    first = (pl.program_id(1) * sets + jnp.arange(sets)) * count
    weights = _weights(w, first, column, tile=tile, dtype=out_ref.dtype, interpret=interpret)
    row = first[:, None, None] + jnp.arange(count)
    for half in range(2):
        for j in range(BLOCK):
            place = (half * words + column) * BLOCK + j
            known = (column < words) & (place < w.in_features)
            if w.permutation is not None:
                place = plgpu.load(w.permutation.at[place], mask=known, other=0).astype(jnp.int32)
            # Interpreted, a masked store writes back what it read. Point it outside the matrix, where none writes.
            place = jnp.where(known, place, w.in_features)[None, :, None]
            mask = known[None, :, None] & (row < out)
            plgpu.store(out_ref.at[place, row], weights[half][j], mask=mask)


def _weights(
    w: Any, first: Array, column: Array, *, tile: Tile, dtype: Any, interpret: bool
) -> list[list[Float[Array, "sets columns rows"]]]:
    """The weights at each code of the blocks in the low and in the high half of these words."""
    bits, out, words = w.codes.shape
    columns = inside(column, words, tile.sets, tile.columns)
    groups = statistics(
        w, column, rows=first, count=tile.rows, columns=columns, zero_factors=(-1.0, -1.0), interpret=interpret
    )
    weights: list[list[list[Array]]] = [[[] for _ in range(BLOCK)] for _ in range(2)]
    for r in range(tile.rows):
        row = first + r
        mask = real(columns, row, out, tile.sets * tile.rows)
        code = code_pairs([plgpu.load(w.codes.at[k, row[:, None], column[None]], mask=mask) for k in range(bits)])
        of_row = [(scale(r), zero(r)) for scale, zero in groups]
        for j, position in enumerate(positions(bits)):
            s, minus_z = of_row[j * len(groups) // BLOCK]
            unit = jnp.float32(2.0 ** (UNIT - position))
            for half, number in enumerate(halves(code(j))):
                shifted = multiply_add(number.astype(jnp.float32), unit, minus_z[half], interpret=interpret)
                weights[half][j].append((s[half] * shifted).astype(dtype))
    return [[_neighbours(rows) for rows in half] for half in weights]


def _neighbours(parts: Sequence[Float[Array, "sets columns"]]) -> Float[Array, "sets columns rows"]:
    """The rows of each set interleaved, in pairs, because the compiler joins only two arrays at a time."""
    if len(parts) == 1:
        return parts[0][:, :, None]
    pair = jnp.stack([_neighbours(parts[0::2]), _neighbours(parts[1::2])], axis=-1)
    return pair.reshape(*pair.shape[:2], -1)
