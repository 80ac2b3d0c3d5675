"""Unpacked weights in the layout that a CPU multiplies one token with at the speed of its memory."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

FEW_ROWS = 32
"""Most rows of activations that are multiplied by the weight chunk by chunk."""

CHUNK_BYTES = 2**20
"""Bytes of a chunk in float32: it stays in the cache of a core between its conversion and its product."""

MOST_CHUNKS = 8
"""Most chunks of a matrix: each is an operation of its own, which takes time to compile."""

MOST_COLUMNS = 2048
"""Columns of one fused product. XLA for CPUs fuses the conversion of a weight only where x is smaller than 16 KB."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowMajor:
    """A weight W = weight / divisor, for CPUs. Products are computed and summed in float32.

    Attributes:
      weight: one row per output feature, in 16 bits where that is precise enough.
      divisor: a power of two for each input feature. It keeps float16 clear of overflow and of subnormal numbers.
      pieces: number of steps in which one row is multiplied. More than 1 for a weight that is not a slice of stacked
        blocks: XLA would convert it before the loop over the tokens, where it does not change.
    """

    weight: Float[Array | np.ndarray, "*stack out in"]
    divisor: Float[Array | np.ndarray, "*stack in"]
    pieces: int = field(default=1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[-2], self.weight.shape[-1]


def row_major_product(x: Float[Array, "*batch in"], w: RowMajor) -> Float[Array, "*batch out"]:
    """y = x Wᵀ = (x / divisor) weightᵀ, accumulated in float32, in x's type.

    For one row, XLA fuses the conversion of the weight, and its slice of stacked blocks, into the product: memory is
    read once, in 16 bits. For a few rows, the weight is converted chunk by chunk, and multiplied while in cache.

    Example:
      >>> w = RowMajor(jnp.full((3, 4), 2.0, jnp.float16), jnp.full(4, 4.0))
      >>> row_major_product(jnp.ones((1, 4)), w)
      Array([[2., 2., 2.]], dtype=float32)
    """
    (out, columns), weight = w.shape, jnp.asarray(w.weight)
    # Not times a reciprocal: XLA would repeat a multiplication, and what x is computed from, inside the product's
    # loop, at a third of the speed. It computes a division by a vector once.
    rows = x.reshape(math.prod(x.shape[:-1]), columns).astype(jnp.float32) / w.divisor
    if len(rows) > FEW_ROWS:
        y = jnp.matmul(rows, weight.astype(jnp.float32).T)
    elif w.pieces > 1:
        height = math.ceil(out / w.pieces) if len(rows) == 1 else _chunk_height(w)
        y = _in_a_loop(rows, weight, height).T
    elif len(rows) == 1:
        y = _one_row(rows, weight)
    else:
        height = max(_chunk_height(w), math.ceil(out / MOST_CHUNKS))
        y = jnp.concatenate([_chunk(rows, weight[start : start + height]) for start in range(0, out, height)]).T
    return y.reshape(*x.shape[:-1], out).astype(x.dtype)


def _chunk_height(w: RowMajor) -> int:
    return max(1, CHUNK_BYTES // (4 * w.shape[1]))


def _in_a_loop(rows: Float[Array, "rows in"], weight: Float[Array, "out in"], height: int) -> Float[Array, "out rows"]:
    """The product with `height` rows of the weight at a time."""
    out = len(weight)
    height = min(height, out)

    def step(index: Int[Array, ""], y: Float[Array, "out rows"]) -> Float[Array, "out rows"]:
        start = jnp.minimum(index * height, out - height)  # the last piece may overlap the one before it
        piece = jax.lax.dynamic_slice_in_dim(weight, start, height)
        product = _one_row(rows, piece).T if len(rows) == 1 else _chunk(rows, piece)
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, axis=0)

    return jax.lax.fori_loop(0, math.ceil(out / height), step, jnp.zeros((out, len(rows)), jnp.float32))


def _one_row(row: Float[Array, "1 in"], weight: Float[Array, "out in"]) -> Float[Array, "1 out"]:
    starts = range(0, row.shape[1], MOST_COLUMNS)
    pieces = [slice(start, start + MOST_COLUMNS) for start in starts]
    products = [jnp.matmul(row[:, piece], weight[:, piece].astype(jnp.float32).T) for piece in pieces]
    return sum(products[1:], start=products[0])


def _chunk(rows: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "out rows"]:
    # The weight is the left operand: XLA rearranges the right one before it multiplies.
    return jnp.matmul(weight.astype(jnp.float32), rows.T)
