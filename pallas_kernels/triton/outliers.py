"""The sparse part of a product: residuals of outliers times activations.

Here and in the other kernels, `w` is an `SpqrTensor` of references to its arrays.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tensor import SpqrTensor
from pallas_kernels.triton.instructions import multiply_add
from pallas_kernels.triton.layouts import by_fours

AT_ONCE = 8
"""Outliers of one row that a program treats at once."""


def outlier_products(
    x_ref: Any, w: Any, *, rows: Int[Array, " sets"], count: int, tiles: int, interpret: bool
) -> list[Float[Array, " sets"]]:
    """Of each of `count` rows from `rows` on, Σ residual · x over this program's share of the row's outliers.

    The grid is (rows, tiles, tokens); the programs of all tiles share the outliers of a row evenly.
    """
    token, lane = pl.program_id(2), jnp.arange(AT_ONCE)[None]

    def product(_: int, start: Array, stop: Array, i: Array, total: Array) -> Array:
        place = start[:, None] + i * AT_ONCE + lane
        residual, column = _outlier(w, place, place < stop[:, None])
        value = plgpu.load(x_ref.at[token, _feature(w, column)]).astype(jnp.float32)
        return multiply_add(residual, value, total, interpret=interpret)

    sums = _over_shares(product, w, rows, count, tiles, AT_ONCE, jnp.zeros((rows.shape[0], AT_ONCE), jnp.float32))
    return [total.sum(axis=1) for total in sums]


def outlier_products_of_tokens(
    x_ref: Any,
    w: Any,
    *,
    rows: Int[Array, " sets"],
    count: int,
    tiles: int,
    token: Int[Array, " tokens"],
    interpret: bool,
) -> list[Float[Array, "sets tokens"]]:
    """The same for several tokens; x is `[in, tokens]`."""

    def product(_: int, start: Array, stop: Array, i: Array, total: Array) -> Array:
        place = start + i
        residual, column = _outlier(w, place, place < stop)
        known = jnp.broadcast_to((token < x_ref.shape[1])[None], total.shape)
        at = x_ref.at[_feature(w, column)[:, None], by_fours(token)[None]]
        value = plgpu.load(at, mask=known, other=0).astype(jnp.float32)
        return multiply_add(jnp.broadcast_to(residual[:, None], total.shape), value, total, interpret=interpret)

    return _over_shares(product, w, rows, count, tiles, 1, jnp.zeros((rows.shape[0], token.shape[0]), jnp.float32))


def add_outliers(out_ref: Any, w: Any, *, rows: Int[Array, " sets"], count: int) -> None:
    """Adds the residuals to the weights in `[in, out]`, of which this program has written these columns."""
    lane = jnp.arange(AT_ONCE)[None]

    def add(r: int, start: Array, stop: Array, i: Array, _: None) -> None:
        place = start[:, None] + i * AT_ONCE + lane
        real = place < stop[:, None]
        residual, column = _outlier(w, place, real)
        # Interpreted, a masked store writes what it has read: beside the matrix, where nothing else is written.
        at = out_ref.at[jnp.where(real, _feature(w, column), out_ref.shape[0]), (rows + r)[:, None]]
        beneath = plgpu.load(at, mask=real, other=0).astype(jnp.float32)
        plgpu.store(at, (beneath + residual).astype(out_ref.dtype), mask=real)

    _over_shares(add, w, rows, count, 1, AT_ONCE, None)


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
    tiles: int,
    at_once: int,
    carry: Any,
) -> list[Any]:
    """Runs `carry = visit(r, start, stop, i, carry)` for each row r until each share, start to stop, is through."""
    tile, out = pl.program_id(1), w.shape[0]
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
