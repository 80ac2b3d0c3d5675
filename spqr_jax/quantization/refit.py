"""The refit: weights moved, before they are solved, so that they correct for what is quantized already.

Once earlier blocks are quantized, a matrix W receives x instead of the original model's x₀, and the residual stream is
h instead of h₀. The refit minimizes, over the calibration tokens,

    Σ ‖W x₀ + h₀ − h − W' x‖² + ‖(W' − W) Λ^½‖²,

whose solution is W' = W + (W (C − H) + Rᵀ)(H + Λ)⁻¹ with H = Σ x xᵀ, C = Σ x₀ xᵀ and R = Σ x (h₀ − h)ᵀ.

Source: this project's; a ridge regression.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.linalg import (
    BLOCK_ROWS,
    sum_of_products,
    symmetric,
    upper_cholesky,
    upper_inverse,
    upper_square,
)
from spqr_jax.runtime.placement import Placement

REFIT_DAMPING = 0.1
"""Part of Λ, as a share of mean diag H; it keeps the weights where the inputs say little."""

REFIT_BLOCK = 128
"""Features that the refit's product sums at once: few enough that rows round alike, however many a device has."""


class Drift(NamedTuple):
    """Moments of a matrix's input against the original model, summed over the calibration tokens.

    Attributes:
      cross: C = Σ x₀ xᵀ, with x₀ the original model's input and x the quantized model's.
      residual: R = Σ x (h₀ − h)ᵀ, with h₀ and h the residual streams to which the product of x is added; None where
        the matrix does not correct their difference, see `Stage.restores`.
    """

    cross: Float[Array, "in in"]
    residual: Float[Array, "in hidden"] | None


def follows_original(config: SpqrConfig) -> bool:
    """Whether calibration also runs the original model, whose inputs the refit needs.

    Only in sequential runs: solved in one pass, every later matrix of a block would correct the same error again.
    """
    return config.refit and config.sequential


def residual_difference(
    original: Float[Array, "batch tokens hidden"], quantized: Float[Array, "batch tokens hidden"]
) -> Float[Array, "batch tokens hidden"]:
    """h₀ − h in the type of h₀, rounded once."""
    return (original.astype(jnp.float32) - quantized.astype(jnp.float32)).astype(original.dtype)


def drift_sums(
    x: Float[Array, "batch tokens in"],
    original: Float[Array, "batch tokens in"],
    residual: Float[Array, "batch tokens hidden"] | None,
) -> Drift:
    """The sums over one batch of sequences, from the inputs x and x₀ and the difference h₀ − h."""
    return Drift(sum_of_products(original, x), None if residual is None else sum_of_products(x, residual))


@partial(jax.jit, static_argnames="placement")
def refit_kernels(
    kernels: tuple[Float[Array, "in _"], ...],
    hessian: Float[Array, "in in"],
    drift: Drift | None,
    shrinkage: Float[ArrayLike, ""],
    placement: Placement,
) -> tuple[Float[Array, "_ in"], ...]:
    """The weights to be solved for kernels that share an input: refitted, or without a drift as they are."""
    weights = tuple(kernel.T for kernel in kernels)
    if drift is None:
        return weights
    rows = weights, None if drift.residual is None else drift.residual.T
    inverse = ridge_inverse(hessian, shrinkage)
    refitted = placement.by_rows(refit, rows, drift.cross - hessian, inverse, unit=BLOCK_ROWS)
    return tuple(r[: len(w)] for r, w in zip(refitted, weights, strict=True))


def ridge_inverse(hessian: Float[Array, "in in"], shrinkage: Float[ArrayLike, ""]) -> Float[Array, "in in"]:
    """(H + Λ)⁻¹ with Λ = 0.1 · mean diag H + shrinkage · diag H, or Λ = 1 where H is 0 and nothing is refitted."""
    diagonal = jnp.diag(hessian)
    ridge = REFIT_DAMPING * jnp.mean(diagonal) + shrinkage * diagonal
    ridge = jnp.where(ridge == 0, 1, ridge)
    return symmetric(upper_square(upper_inverse(upper_cholesky(hessian + jnp.diag(ridge)))))


def refit(
    rows: tuple[tuple[Float[Array, "_ in"], ...], Float[Array, "_ in"] | None],
    change: Float[Array, "in in"],
    inverse: Float[Array, "in in"],
) -> tuple[Float[Array, "_ in"], ...]:
    """W + (W (C − H) + Rᵀ)(H + Λ)⁻¹.

    Args:
      rows: the matrices W that share the input, and Rᵀ; None leaves h₀ − h out.
      change: C − H.
      inverse: (H + Λ)⁻¹, see `ridge_inverse`.
    """
    weights, residual = rows
    kernel = jnp.concatenate(weights).T
    wanted = _transposed_product(change, kernel)
    if residual is not None:
        wanted += residual.T
    refitted = kernel + _transposed_product(inverse, wanted)
    return tuple(jnp.split(refitted.T, np.cumsum([len(weight) for weight in weights])[:-1]))


def _transposed_product(matrix: Float[Array, "in in"], kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """Mᵀ K, summed over `REFIT_BLOCK` features at a time."""

    def blocks(matrix: Float[Array, "in columns"]) -> Float[Array, "blocks block columns"]:
        padded = jnp.pad(matrix, ((0, -len(matrix) % REFIT_BLOCK), (0, 0)))
        return padded.reshape(-1, REFIT_BLOCK, matrix.shape[1])

    def add(total: Float[Array, "in out"], block: tuple[Array, Array]) -> tuple[Array, None]:
        return total + jnp.matmul(block[0].T, block[1], precision="highest"), None

    return jax.lax.scan(add, jnp.zeros_like(kernel), (blocks(matrix), blocks(kernel)))[0]
