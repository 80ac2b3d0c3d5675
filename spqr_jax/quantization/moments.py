"""What calibration says of a matrix's input: Hessians, and the refit of weights to a quantized model's inputs."""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from spqr_jax.quantization.group_fit import rounded
from spqr_jax.quantization.linalg import upper_cholesky, upper_inverse, upper_square

REFIT_DAMPING = 0.1
"""Part of Λ of the refit as a share of mean diag H; keeps the weights where the inputs say little."""


REFIT_BLOCK = 128
"""Features that the refit's product takes at once: so few that rows are rounded alike however many there are."""

PANELS = 4
"""Parts in which a Hessian is summed; with four, 5/8 of the products of the full square."""


class InputMoments(NamedTuple):
    """Second moments of a matrix's input, summed over the calibration tokens.

    Attributes:
      hessian: H = Σ x xᵀ, with the input that the quantized model gives.
      cross: C = Σ x₀ xᵀ, x₀ being the original model's input; None where nothing is refitted.
      lost: R = Σ x (h₀ − h)ᵀ, h₀ and h being the hidden states of the original and the quantized model to which the
        product of x is added; None where the matrix does not make up for their difference, see `Stage.restores`.
      chance: the part of the squared correlations in H that is chance, see `chance`.
    """

    hessian: Float[Array, "in in"]
    cross: Float[Array, "in in"] | None
    lost: Float[Array, "in hidden"] | None
    chance: Float[Array, ""]


class MomentSums(NamedTuple):
    """What is summed over sequences to get `InputMoments`.

    Attributes:
      hessian: Σ x xᵀ; of this symmetric matrix only the upper triangle of blocks.
      cross: Σ x₀ xᵀ.
      lost: Σ x (h₀ − h)ᵀ.
      correlations: of each feature i, Σ_{j>i} r_ij², summed over the sequences, r = h_ij / √(h_ii h_jj) being the
        correlations in one sequence.
    """

    hessian: Float[Array, "in in"]
    cross: Float[Array, "in in"] | None
    lost: Float[Array, "in hidden"] | None
    correlations: Float[Array, "in 1"]


def moment_sums(
    x: Float[Array, "batch tokens in"],
    original: Float[Array, "batch tokens in"] | None = None,
    lost: Float[Array, "batch tokens hidden"] | None = None,
) -> MomentSums:
    """The sums over one batch of sequences, of the inputs in both models and of what hidden states have lost."""
    hessians = [_upper_hessian(sequence[None]) for sequence in x]
    return MomentSums(
        hessian=reduce(jnp.add, hessians),
        cross=None if original is None else _product(original, x),
        lost=None if lost is None else _product(x, lost),
        correlations=reduce(jnp.add, map(_squared_correlations, hessians)),
    )


def complete(sums: MomentSums, sequences: int) -> InputMoments:
    """The moments, from the sums over so many sequences."""
    return InputMoments(_symmetric(sums.hessian), sums.cross, sums.lost, chance(sums, sequences))


def chance(sums: MomentSums, sequences: int) -> Float[Array, ""]:
    """ρ = Σ_{i≠j} Var(r_ij) / Σ_{i≠j} r_ij², r being the correlations that H shows; 0 for a single sequence.

    The variance of a mean over sequences, from how the sequences differ:
    Σ Var(r_ij) = (mean over sequences of Σ r_ij² − Σ r_ij²) / (sequences − 1).

    With correlations times 1 − ρ, the expected squared error of all is least.

    Source: Schäfer and Strimmer 2005, A shrinkage approach to large-scale covariance matrix estimation, target D; a
    sequence is one observation, because its tokens are not independent.
    """
    if sequences == 1:
        return jnp.zeros(())
    whole = jnp.sum(_squared_correlations(sums.hessian))
    single = jnp.sum(sums.correlations) / sequences
    share = (single - whole) / (sequences - 1) / jnp.where(whole == 0, 1, whole)
    # Of few digits: sums in another order, as on several devices, are not to give other codes.
    return rounded(jnp.clip(share, 0, 1), jnp.bfloat16)


def _upper_hessian(x: Float[Array, "batch tokens in"]) -> Float[Array, "in in"]:
    panel = x.shape[-1] // PANELS
    panels = [
        jnp.pad(_product(x[..., start : start + panel], x[..., start:]), ((0, 0), (start, 0)))
        for start in range(0, panel * PANELS, panel)
    ]
    return jnp.concatenate(panels)


def _squared_correlations(hessian: Float[Array, "in in"]) -> Float[Array, "in 1"]:
    """Σ_{j>i} r_ij² of each feature i; features that never occur have no correlations."""
    diagonal = jnp.diag(hessian)
    norm = jnp.where(diagonal > 0, jax.lax.rsqrt(diagonal), 0)
    return jnp.sum(jnp.triu(jnp.square(hessian * norm[:, None] * norm), 1), axis=1, keepdims=True)


def _symmetric(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The symmetric matrix of which the upper triangle is given."""
    upper = jnp.triu(matrix)
    return upper + jnp.triu(upper, 1).T


def _product(
    a: Float[Array, "batch tokens rows"], b: Float[Array, "batch tokens columns"]
) -> Float[Array, "rows columns"]:
    # Not as a product of two matrices: of these, XLA multiplies a transposed one without the units that a CPU may have
    # for bfloat16.
    return jnp.einsum("bti,btj->ij", a, b, precision="highest", preferred_element_type=jnp.float32)


def ridge_inverse(hessian: Float[Array, "in in"], shrinkage: Float[ArrayLike, ""]) -> Float[Array, "in in"]:
    """(H + Λ)⁻¹ with Λ = 0.1 · mean diag H + shrinkage · diag H."""
    diagonal = jnp.diag(hessian)
    ridge = REFIT_DAMPING * jnp.mean(diagonal) + shrinkage * diagonal
    return _symmetric(upper_square(upper_inverse(upper_cholesky(hessian + jnp.diag(ridge)))))


def refit(
    rows: tuple[tuple[Float[Array, "_ in"], ...], Float[Array, "_ in"] | None],
    drift: Float[Array, "in in"],
    inverse: Float[Array, "in in"],
) -> tuple[Float[Array, "_ in"], ...]:
    """W + (W (C − H) + Rᵀ)(H + Λ)⁻¹: what best gives W x₀ + h₀ − h from the inputs x, held to W by Λ.

    Minimizes Σ ‖W x₀ + h₀ − h − W' x‖² + ‖(W' − W) Λ^½‖². See `InputMoments`.

    Args:
      rows: the matrices W that share the input, and Rᵀ; without it, h₀ − h is left out.
      drift: C − H.
      inverse: (H + Λ)⁻¹, see `ridge_inverse`.
    """
    weights, lost = rows
    kernel = jnp.concatenate(weights).T
    wanted = _transposed_product(drift, kernel)
    if lost is not None:
        wanted += lost.T
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


def relative_error(
    weight: Float[Array, "out in"], approximation: Float[Array, "out in"], hessian: Float[Array, "in in"]
) -> Float[Array, ""]:
    """‖(W − Ŵ) X‖² / ‖W X‖², from H = X Xᵀ."""

    def energy(w: Array) -> Array:
        return jnp.vdot(w, jnp.matmul(w, hessian, precision="highest"))

    return energy(weight - approximation) / energy(weight)
