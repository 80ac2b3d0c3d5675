"""The Cholesky factor of the inverse Hessian, and the order in which features are quantized.

Source: Frantar et al. 2022 (GPTQ, arXiv 2210.17323).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.linalg import upper_cholesky, upper_inverse, upper_square


class Factor(NamedTuple):
    """A factorized Hessian, in quantization order.

    Attributes:
      inverse_factor: U, upper triangular, with H⁻¹ = Uᵀ U after damping.
      dead: features that are always 0 in the calibration data.
      permutation: quantization order → input feature, or None for the identity.
    """

    inverse_factor: Float[Array, "in in"]
    dead: Bool[Array, " in"]
    permutation: Int[Array, " in"] | None


@partial(jax.jit, static_argnames="config")
def factorize(hessian: Float[Array, "in in"], config: SpqrConfig, shrinkage: Float[ArrayLike, ""] = 0.0) -> Factor:
    """Damps and inverts a Hessian: U with (H + damping · mean|diag H| + shrinkage · diag H)⁻¹ = Uᵀ U.

    Features are in quantization order. Where the factorization fails, damps ten times more, up to three times. U is NaN
    if that does not help.
    """
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diag(hessian)
    permutation = None
    if config.permutation == "act_order":
        permutation = jnp.argsort(-diagonal)
        # One gather for rows and columns: after two, XLA reads the result against its order in memory.
        hessian, diagonal = hessian[permutation[:, None], permutation], diagonal[permutation]
    dead = diagonal == 0
    scale = jnp.mean(jnp.abs(diagonal))

    def inverse_factor(damping: Float[Array, ""]) -> Float[Array, "in in"]:
        damped = hessian + jnp.diag(jnp.where(dead, 1, damping * scale + shrinkage * diagonal))
        # One factorization of the reversed H would do, but loses a digit: its pivots then come smallest first.
        return upper_cholesky(upper_square(upper_inverse(upper_cholesky(damped))))

    def untried_or_failed(state: tuple[Any, Any, Array]) -> Bool[Array, ""]:
        attempt, _, factor = state
        return (attempt < 4) & ~jnp.isfinite(factor[0, 0])  # a failed factorization is NaN throughout

    def attempt(state: tuple[Any, Any, Array]) -> tuple[Any, Any, Array]:
        count, damping, _ = state
        return count + 1, jnp.maximum(damping, 1e-3) * 10, inverse_factor(damping)

    start = 0, jnp.float32(config.damping), jnp.full_like(hessian, jnp.nan)
    _, _, factor = jax.lax.while_loop(untried_or_failed, attempt, start)
    return Factor(factor, dead, permutation)


def identity_factor(features: int) -> Factor:
    """The factor of H = I, with which the solver rounds to nearest."""
    return Factor(jnp.eye(features), jnp.zeros(features, bool), None)


def in_order(weight: Float[Array, "out in"], factor: Factor) -> Float[Array, "out in"]:
    """The weight with its columns in quantization order, those of dead features set to 0."""
    if factor.permutation is not None:
        weight = weight.T[factor.permutation].T  # moving rows is faster than moving columns
    return jnp.where(factor.dead, 0, weight)
