"""Factors, inverses and sums of products of symmetric matrices, in blocks that skip the zeros of triangular ones.

A triangular solve with as many right-hand sides as rows runs at a third of a product's speed, and does not use that the
identity is triangular too. Blocks are few, so that a matrix of any size compiles to few operations.
"""

import jax.numpy as jnp
from jax.lax.linalg import cholesky, triangular_solve
from jaxtyping import Array, Float

SMALLEST_HALVED = 384
"""Rows up to which a factor is inverted as a whole."""

HALVINGS = 4
"""The most times that a larger one is halved."""

PANELS = 4
"""Panels in which R Rᵀ is computed; four take 15/32 of the operations of the full product."""

BLOCK_ROWS = 16
"""Rows that are summed or multiplied together on whichever device they are, so that all round alike."""


def upper_cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """R, upper triangular, with A = Rᵀ R; NaN throughout where A is not positive definite.

    Only the upper triangle of A is read.
    """
    # LAPACK stores columns contiguously: with Aᵀ = A and R = Lᵀ, rows serve as its columns and nothing is transposed.
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
    """R Rᵀ of an upper triangular R; some of the blocks below the diagonal are left 0."""
    size = len(upper)
    width = max(-(-size // PANELS), 1)

    def panel(start: int) -> Float[Array, "n width"]:
        stop = min(start + width, size)
        product = _product(upper[:stop, start:], upper[start:stop, start:].T)
        return jnp.pad(product, ((0, size - stop), (0, 0)))

    return jnp.concatenate([panel(start) for start in range(0, size, width)], axis=1)


def _product(a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]) -> Float[Array, "rows columns"]:
    return jnp.matmul(a, b, precision="highest")


def symmetric(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The symmetric matrix with this upper triangle."""
    upper = jnp.triu(matrix)
    return upper + jnp.triu(upper, 1).T


def sum_of_products(
    a: Float[Array, "batch tokens rows"], b: Float[Array, "batch tokens columns"]
) -> Float[Array, "rows columns"]:
    """Σ a bᵀ over all tokens, in float32."""
    # Not as a product of two matrices: XLA would then multiply the transposed one without the bfloat16 units of a CPU.
    return jnp.einsum("bti,btj->ij", a, b, precision="highest", preferred_element_type=jnp.float32)
