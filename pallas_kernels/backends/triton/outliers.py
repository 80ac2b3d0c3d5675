"""The sparse part of a product: residuals of outliers times activations.

Here and in the other kernels, `w` is an `SpqrTensor` of references to its arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.backends.triton.instructions import multiply_add
from pallas_kernels.backends.triton.launch import Launch
from pallas_kernels.backends.triton.layouts import by_fours
from pallas_kernels.backends.triton.results import result
from pallas_kernels.format.tensor import SpqrTensor

ADDED_AT_ONCE = 128
"""Outliers of one row that a program adds at once to a dense matrix."""


class SparseTile(NamedTuple):
    """The outliers of one program.

    Attributes:
      shares: programs that divide the outliers of a row evenly, each with sums of its own.
      rows: neighbouring rows.
      lanes: outliers of each row at once.
    """

    shares: int
    rows: int
    lanes: int


def sparse_tile(at_once: int) -> SparseTile:
    """The fastest of those tried on an H100, for a number of tokens at once."""
    if at_once == 1:
        return SparseTile(shares=4, rows=16, lanes=32)
    return SparseTile(shares=2, rows=8, lanes=256 // at_once)


def shares(w: SpqrTensor, at_once: int) -> int:
    """Partial sums of the sparse part for each row; 0 without outliers."""
    return 0 if w.outliers is None else sparse_tile(at_once).shares


def sparse_programs(w: SpqrTensor, at_once: int) -> int:
    """Programs that multiply outliers, for each block of tokens."""
    return shares(w, at_once) * pl.cdiv(w.shape[0], sparse_tile(at_once).rows)


def sparse_part(
    x_ref: Float[Any, "in tokens"], w: Any, out_ref: Any, number: Array, *, block: Array, at_once: int, interpret: bool
) -> None:
    """Σ residual · x over a share of the outliers of some rows, for a block of tokens.

    Programs of their own do this, because each waits for memory three times: for the offsets of its rows, for the
    columns, and for the activations. Meanwhile other programs multiply the dense part. The sparse ones come last, when
    processors would otherwise be idle.

    x is in quantization order, because scattered reads are the bottleneck and the permutation would double them.
    """
    out, tokens, tile = w.outliers.offsets.shape[0] - 1, x_ref.shape[1], sparse_tile(at_once)
    share, row = number % tile.shares, number // tile.shares * tile.rows + jnp.arange(tile.rows)
    token = block * at_once + jnp.arange(at_once)
    known, shape = token < tokens, (tile.rows, tile.lanes, at_once)
    start, stop = (plgpu.load(w.outliers.offsets.at[jnp.minimum(row + place, out)]) for place in range(2))
    size = _ceil(stop - start, tile.shares)
    start = start + share * size
    stop = jnp.minimum(start + size, stop)
    neighbours = token if at_once == 1 else by_fours(token)

    def step(i: Array, total: Array) -> Array:
        place = start[:, None] + i * tile.lanes + jnp.arange(tile.lanes)
        residual, column = _outlier(w.outliers, place, place < stop[:, None])
        at = x_ref.at[column[:, :, None], neighbours[None, None]]
        value = plgpu.load(at, mask=jnp.broadcast_to(known[None, None], shape), other=0).astype(jnp.float32)
        return multiply_add(jnp.broadcast_to(residual[:, :, None], shape), value, total, interpret=interpret)

    steps = _ceil(jnp.max(size), tile.lanes)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32)).sum(axis=1)
    at = out_ref.at[out_ref.shape[0] - tile.shares + share, token[None], row[:, None]]
    plgpu.store(at, total, mask=known[None] & (row < out)[:, None])


def sparse_launch(w: SpqrTensor, tokens: int, at_once: int) -> Launch:
    """The programs of the sparse part, and their loop where outliers are spread evenly."""
    if w.outliers is None:
        return Launch()
    tile = sparse_tile(at_once)
    share = pl.cdiv(pl.cdiv(w.outliers.capacity, w.shape[0]), tile.shares)
    programs = sparse_programs(w, at_once) * pl.cdiv(tokens, at_once)
    return Launch(sparse_programs=programs, outlier_steps=pl.cdiv(share, tile.lanes))


def add_outliers(dense: Float[Array, "in out"], w: SpqrTensor, *, interpret: bool) -> Float[Array, "in out"]:
    """Adds the residuals to the dense part ŵᵀ, in place.

    A kernel of its own, with a program for each row. In the programs that write a tile it took longer: at 2048 tokens
    85 µs, against 44 + 32 (H200).
    """
    sparse = w.outliers, w.permutation
    return pl.pallas_call(
        _add_kernel,
        out_shape=result(dense.shape, dense.dtype, (dense, sparse)),
        grid=w.shape[:1],
        compiler_params=plgpu.CompilerParams(num_warps=1),
        input_output_aliases={0: 0},
        interpret=interpret,
        name="spqr_add_outliers",
    )(dense, sparse)


def _add_kernel(_: Any, sparse: tuple[Any, Any], out_ref: Any) -> None:
    outliers, permutation = sparse
    row, lane = pl.program_id(0), jnp.arange(ADDED_AT_ONCE)
    start, stop = (plgpu.load(outliers.offsets.at[row + place]) for place in range(2))

    def add(i: Array, _: None) -> None:
        place = start + i * ADDED_AT_ONCE + lane
        real = place < stop
        residual, column = _outlier(outliers, place, real)
        # Interpreted, a masked store writes back what it read. Point it outside the matrix, where no program writes.
        at = out_ref.at[jnp.where(real, _feature(permutation, column), out_ref.shape[0]), row]
        beneath = plgpu.load(at, mask=real, other=0).astype(jnp.float32)
        plgpu.store(at, (beneath + residual).astype(out_ref.dtype), mask=real)

    jax.lax.fori_loop(0, _ceil(stop - start, ADDED_AT_ONCE), add, None)


def _outlier(outliers: Any, place: Array, real: Array) -> tuple[Array, Array]:
    """Residual and column, in quantization order, of outliers; zero where `real` is false."""
    column = plgpu.load(outliers.columns.at[place], mask=real, other=0).astype(jnp.int32)
    return plgpu.load(outliers.values.at[place], mask=real, other=0).astype(jnp.float32), column


def _feature(permutation: Any, column: Array) -> Array:
    return column if permutation is None else plgpu.load(permutation.at[column]).astype(jnp.int32)


def _ceil(a: Array, b: int) -> Array:
    """⌈a / b⌉ of nonnegative numbers; signs would take more instructions."""
    return jax.lax.div(a + (b - 1), jnp.int32(b))
