"""Many tokens: the weight is written out once, for a matrix product that is not ours."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.packing import BLOCK
from pallas_kernels.tensor import SpqrTensor
from pallas_kernels.tiles import DEFAULT, Tile
from pallas_kernels.triton.code_pairs import UNIT, code_pairs, positions
from pallas_kernels.triton.instructions import halves, multiply_add
from pallas_kernels.triton.launch import Launch
from pallas_kernels.triton.outliers import AT_ONCE, add_outliers, outlier_steps
from pallas_kernels.triton.results import result
from pallas_kernels.triton.statistics import inside, real, statistics


def dequantize_matrix(
    w: SpqrTensor, dtype: DTypeLike, *, tile: Tile = DEFAULT["dequantize"], interpret: bool
) -> Float[Array, "out in"]:
    """ŵ with columns in quantization order."""
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, interpret=interpret),
        out_shape=result(w.shape, dtype, w),
        # The second axis is that along which programs share outliers: here one program has them all.
        grid=(pl.cdiv(w.shape[0], tile.sets * tile.rows), 1),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="spqr_dequantize",
    )(w)


def launch(w: SpqrTensor, tokens: int, tile: Tile) -> Launch:
    """The size of the launch, whatever the number of tokens."""
    return Launch(steps=pl.cdiv(w.codes.shape[2], tile.columns), outlier_steps=outlier_steps(w, 1, AT_ONCE))


def _kernel(w: Any, out_ref: Any, *, tile: Tile, interpret: bool) -> None:
    bits, out, words = w.codes.shape
    sets, count, size = tile.sets, tile.rows, tile.columns
    first = (pl.program_id(0) * sets + jnp.arange(sets)) * count

    def step(i: Array, _: None) -> None:
        start = i * size
        column = start + jnp.arange(size)
        columns = inside(column, words, sets, size)
        groups = statistics(
            w, column, rows=first, count=count, columns=columns, zero_factors=(-1.0, -1.0), interpret=interpret
        )
        for r in range(count):
            row = first + r
            mask = real(columns, row, out, sets * count)
            code = code_pairs([plgpu.load(w.codes.at[k, row[:, None], column[None]], mask=mask) for k in range(bits)])
            of_row = [(scale(r), zero(r)) for scale, zero in groups]
            weights: list[list[Array]] = [[], []]
            for j, position in enumerate(positions(bits)):
                s, minus_z = of_row[j * len(groups) // BLOCK]
                unit = jnp.float32(2.0 ** (UNIT - position))
                for half, number in enumerate(halves(code(j))):
                    shifted = multiply_add(number.astype(jnp.float32), unit, minus_z[half], interpret=interpret)
                    weights[half].append((s[half] * shifted).astype(out_ref.dtype))
            for half, block in enumerate(weights):
                place = (half * words + start) * BLOCK + jnp.arange(size * BLOCK)
                end = jnp.minimum((half * words + words) * BLOCK, w.in_features)
                mask = (row < out)[:, None] & (place < end)[None]
                plgpu.store(out_ref.at[row[:, None], place[None]], _interleave(block), mask=mask)

    jax.lax.fori_loop(0, pl.cdiv(words, size), step, None)
    if w.row_offsets is not None:
        # What other threads of the program have written is read again.
        if not interpret:
            plgpu.debug_barrier()
        add_outliers(out_ref, w, rows=first, count=count)


def _interleave(parts: Sequence[Float[Array, "rows columns"]]) -> Float[Array, "rows parts*columns"]:
    """The first column of every part, then the second, and so on; the compiler joins only two at a time."""
    if len(parts) == 1:
        return parts[0]
    pair = jnp.stack([_interleave(parts[0::2]), _interleave(parts[1::2])], axis=-1)
    return pair.reshape(pair.shape[0], -1)
