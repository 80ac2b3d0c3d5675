"""What calibration says of a matrix's input: Hessians, and the refit of weights to a quantized model's inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

REFIT_DAMPING = 0.1
"""λ of the refit as a share of mean diag H; keeps the weights where the inputs say little."""


class InputMoments(NamedTuple):
    """Second moments of a matrix's input, summed over the calibration tokens.

    Attributes:
      hessian: H = Σ x xᵀ, with the input that the quantized model gives.
      cross: C = Σ x₀ xᵀ, x₀ being the original model's input; None where nothing is refitted.
    """

    hessian: Float[Array, "in in"]
    cross: Float[Array, "in in"] | None


def input_moments(x: Float[Array, "batch tokens in"], original: Float[Array, "batch tokens in"] | None) -> InputMoments:
    """Moments of one batch of inputs."""

    def product(a: Array) -> Array:
        return jnp.einsum("bti,btj->ij", a, x, precision="highest", preferred_element_type=jnp.float32)

    return InputMoments(product(x), None if original is None else product(original))


def refit(weight: Float[Array, "out in"], moments: InputMoments) -> Float[Array, "out in"]:
    """W + W (C − H)(H + λI)⁻¹: what best gives the original outputs W x₀ from the inputs x, held to W by λ.

    Minimizes Σ ‖W x₀ − W' x‖² + λ ‖W' − W‖² with λ = 0.1 · mean diag H.
    """
    hessian, cross = moments
    if cross is None:
        return weight
    ridge = REFIT_DAMPING * jnp.mean(jnp.diag(hessian))
    factor = jax.scipy.linalg.cho_factor(hessian + ridge * jnp.eye(len(hessian)))
    drift = jnp.matmul(weight, cross - hessian, precision="highest")
    return weight + jax.scipy.linalg.cho_solve(factor, drift.T).T


def relative_error(
    weight: Float[Array, "out in"], approximation: Float[Array, "out in"], hessian: Float[Array, "in in"]
) -> Float[Array, ""]:
    """‖(W − Ŵ) X‖² / ‖W X‖², from H = X Xᵀ."""

    def energy(w: Array) -> Array:
        return jnp.vdot(w, jnp.matmul(w, hessian, precision="highest"))

    return energy(weight - approximation) / energy(weight)
