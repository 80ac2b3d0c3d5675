"""Factors and inverses of symmetric matrices, the large products in blocks that leave out what is zero.

A solve with as many right-hand sides as rows runs at a third of a product's speed, and does not know that both the
factor and the identity are triangular. Blocks are few, so that a matrix of any size compiles to few operations.
"""

import jax.numpy as jnp
from jax.lax.linalg import cholesky, triangular_solve
from jaxtyping import Array, Float

SMALLEST_HALVED = 384
"""Rows up to which a factor is inverted as a whole."""

HALVINGS = 4
"""How often a larger one is halved at most."""

PANELS = 4
"""Parts in which a product is taken; with four, 15/32 of the full product."""


def upper_cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """R, upper triangular, with A = Rᵀ R; NaN throughout where A is not positive definite.

    Reads the upper triangle alone.
    """
    # LAPACK has columns contiguous: with Aᵀ = A and R = Lᵀ, rows serve as its columns and nothing is rearranged.
    return cholesky(matrix.T, symmetrize_input=False).T


def upper_inverse(upper: Float[Array, "n n"], halvings: int = HALVINGS) -> Float[Array, "n n"]:
    """R⁻¹ of an upper triangular R: [[A, B], [0, C]]⁻¹ = [[A⁻¹, −A⁻¹ B C⁻¹], [0, C⁻¹]]."""
    size = len(upper)
    if halvings == 0 or size <= SMALLEST_HALVED:
        identity = jnp.eye(size, dtype=upper.dtype)
        return triangular_solve(upper.T, identity, left_side=True, lower=True).T
    half = size // 2
    first, last = (upper_inverse(block, halvings - 1) for block in (upper[:half, :half], upper[half:, half:]))
    corner = -_product(_product(first, upper[:half, half:]), last)
    return jnp.block([[first, corner], [jnp.zeros_like(corner.T), last]])


def upper_square(upper: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """R Rᵀ of an upper triangular R, without some of the blocks under the diagonal: they are left 0."""
    size = len(upper)
    width = max(-(-size // PANELS), 1)

    def panel(start: int) -> Float[Array, "n width"]:
        stop = min(start + width, size)
        product = _product(upper[:stop, start:], upper[start:stop, start:].T)
        return jnp.pad(product, ((0, size - stop), (0, 0)))

    return jnp.concatenate([panel(start) for start in range(0, size, width)], axis=1)


def _product(a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]) -> Float[Array, "rows columns"]:
    return jnp.matmul(a, b, precision="highest")
