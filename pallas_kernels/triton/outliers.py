"""The sparse part of a product: residuals of outliers times activations.

Here and in the other kernels, `w` is an `SpqrTensor` of references to its arrays.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tensor import SpqrTensor
from pallas_kernels.triton.instructions import multiply_add
from pallas_kernels.triton.layouts import by_fours
from pallas_kernels.triton.results import result

AT_ONCE = 8
"""Outliers of one row that a program treats at once."""
ADDED_AT_ONCE = 128
"""The same where they are added to a dense matrix."""
IN_TURN = 4
"""The same where each is multiplied with several tokens: what the one reads does not wait for the other."""


def outlier_products(
    x_ref: Float[Any, "in tokens"], w: Any, *, rows: Int[Array, " sets"], count: int, tiles: int, interpret: bool
) -> list[Float[Array, " sets"]]:
    """Of each of `count` rows from `rows` on, Σ residual · x over this program's share of the row's outliers.

    The grid is (tiles, rows, tokens); the programs of all tiles share the outliers of a row evenly. x is in
    quantization order: memory serves one place after the other, and the permutation would take as long again.
    """
    token, lane, part = pl.program_id(2), jnp.arange(AT_ONCE)[None], (pl.program_id(0), tiles)

    def product(_: int, start: Array, stop: Array, i: Array, total: Array) -> Array:
        place = start[:, None] + i * AT_ONCE + lane
        residual, column = _outlier(w, place, place < stop[:, None])
        value = plgpu.load(x_ref.at[column, token]).astype(jnp.float32)
        return multiply_add(residual, value, total, interpret=interpret)

    sums = _over_shares(product, w, rows, count, part, AT_ONCE, jnp.zeros((rows.shape[0], AT_ONCE), jnp.float32))
    return [total.sum(axis=1) for total in sums]


def outlier_products_of_tokens(
    x_ref: Float[Any, "in tokens"],
    w: Any,
    *,
    rows: Int[Array, " sets"],
    count: int,
    tiles: int,
    token: Int[Array, " tokens"],
    interpret: bool,
) -> list[Float[Array, "sets tokens"]]:
    """The same for several tokens."""

    def product(_: int, start: Array, stop: Array, i: Array, total: Array) -> Array:
        known = jnp.broadcast_to((token < x_ref.shape[1])[None], total.shape)
        for n in range(IN_TURN):
            place = start + i * IN_TURN + n
            residual, column = _outlier(w, place, place < stop)
            value = plgpu.load(x_ref.at[column[:, None], by_fours(token)[None]], mask=known, other=0)
            residual = jnp.broadcast_to(residual[:, None], total.shape)
            total = multiply_add(residual, value.astype(jnp.float32), total, interpret=interpret)
        return total

    start = jnp.zeros((rows.shape[0], token.shape[0]), jnp.float32)
    return _over_shares(product, w, rows, count, (pl.program_id(0), tiles), IN_TURN, start)


class Outliers(NamedTuple):
    """The fields of an `SpqrTensor` with which residuals are added to a dense matrix."""

    row_offsets: Array | None
    outlier_columns: Array | None
    outlier_values: Array | None
    permutation: Array | None


def add_outliers(dense: Float[Array, "in out"], w: SpqrTensor, *, interpret: bool) -> Float[Array, "in out"]:
    """Adds the residuals to the dense part ŵᵀ, in place.

    A kernel of its own: so there can be as many programs as rows, and none waits for the dense part of another.
    """
    outliers = Outliers(*(getattr(w, name) for name in Outliers._fields))
    return pl.pallas_call(
        _add_kernel,
        out_shape=result(dense.shape, dense.dtype, (dense, outliers)),
        grid=w.shape[:1],
        compiler_params=plgpu.CompilerParams(num_warps=1),
        input_output_aliases={0: 0},
        interpret=interpret,
        name="spqr_add_outliers",
    )(dense, outliers)


def _add_kernel(_: Any, w: Any, out_ref: Any) -> None:
    row, lane = pl.program_id(0) + jnp.arange(1), jnp.arange(ADDED_AT_ONCE)[None]

    def add(r: int, start: Array, stop: Array, i: Array, _: None) -> None:
        place = start[:, None] + i * ADDED_AT_ONCE + lane
        real = place < stop[:, None]
        residual, column = _outlier(w, place, real)
        # Interpreted, a masked store writes what it has read: beside the matrix, where nothing else is written.
        at = out_ref.at[jnp.where(real, _feature(w, column), out_ref.shape[0]), (row + r)[:, None]]
        beneath = plgpu.load(at, mask=real, other=0).astype(jnp.float32)
        plgpu.store(at, (beneath + residual).astype(out_ref.dtype), mask=real)

    _over_shares(add, w, row, 1, (jnp.int32(0), 1), ADDED_AT_ONCE, None)


def outlier_steps(w: SpqrTensor, tiles: int, at_once: int) -> int:
    """How often a program runs through its loop over outliers where they are spread evenly."""
    if w.outlier_values is None:
        return 0
    return pl.cdiv(pl.cdiv(pl.cdiv(w.outlier_values.shape[0], w.shape[0]), tiles), at_once)


def _outlier(w: Any, place: Array, real: Array) -> tuple[Array, Array]:
    """Residual and column, in quantization order, of outliers; those that are not real are zero."""
    column = plgpu.load(w.outlier_columns.at[place], mask=real, other=0).astype(jnp.int32)
    return plgpu.load(w.outlier_values.at[place], mask=real, other=0).astype(jnp.float32), column


def _feature(w: Any, column: Array) -> Array:
    return column if w.permutation is None else plgpu.load(w.permutation.at[column]).astype(jnp.int32)


def _over_shares(
    visit: Callable[[int, Array, Array, Array, Any], Any],
    w: Any,
    rows: Int[Array, " sets"],
    count: int,
    part: tuple[Array, int],
    at_once: int,
    carry: Any,
) -> list[Any]:
    """Runs `carry = visit(r, start, stop, i, carry)` for each row r until its share, start to stop, is through.

    Args:
      part: which share, of how many equal ones.
    """
    (tile, tiles), out = part, w.row_offsets.shape[0] - 1
    ends = [plgpu.load(w.row_offsets.at[jnp.minimum(rows + r, out)]) for r in range(count + 1)]
    shares = [_ceil(stop - start, tiles) for start, stop in itertools.pairwise(ends)]
    starts = [start + tile * share for start, share in zip(ends, shares, strict=False)]
    stops = [jnp.minimum(start + share, end) for start, share, end in zip(starts, shares, ends[1:], strict=True)]

    def step(i: Array, carries: list[Any]) -> list[Any]:
        return [visit(r, starts[r], stops[r], i, carries[r]) for r in range(count)]

    longest = functools.reduce(jnp.maximum, [jnp.max(share) for share in shares])
    return jax.lax.fori_loop(0, _ceil(longest, at_once), step, [carry] * count)


def _ceil(a: Array, b: int) -> Array:
    """⌈a / b⌉ of numbers that are not negative; to allow for others takes more instructions."""
    return jax.lax.div(a + (b - 1), jnp.int32(b))
