"""Second moments of a matrix's input over the calibration tokens, and how much of them is sampling noise."""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spqr_jax.quantization.group_fit import rounded
from spqr_jax.quantization.linalg import sum_of_products, symmetric
from spqr_jax.quantization.refit import Drift, drift_sums

FEATURES_PER_TOKEN = 8
"""Input features to a token above which a Hessian is mostly damping: that of n tokens has rank n at most."""

PANELS = 4
"""Panels in which a Hessian is summed; four take 5/8 of the operations of the full square."""


class InputMoments(NamedTuple):
    """Second moments of a matrix's input, summed over the calibration tokens.

    Attributes:
      hessian: H = Σ x xᵀ, with the input x that the quantized model gives.
      drift: moments against the original model's input; None where nothing is refitted.
      sampling_noise: ρ, the share of the squared correlations in H that is sampling noise, see `sampling_noise`.
    """

    hessian: Float[Array, "in in"]
    drift: Drift | None
    sampling_noise: Float[Array, ""]


class MomentSums(NamedTuple):
    """Sums over sequences that give `InputMoments`; on a mesh, arrays are split by rows.

    Attributes:
      hessian: Σ x xᵀ; only the upper triangle of blocks of this symmetric matrix.
      drift: see `InputMoments`.
      correlations: of each feature i, Σ_{j>i} r_ij², summed over the sequences; r = h_ij / √(h_ii h_jj) are the
        correlations in one sequence.
      counts: of experts, the tokens and the sequences with any, in each row; else None.
    """

    hessian: Float[Array, "rows in"]
    drift: Drift | None
    correlations: Float[Array, "rows 1"]
    counts: Float[Array, "rows 2"] | None = None


def moment_sums(
    x: Float[Array, "batch tokens in"],
    original: Float[Array, "batch tokens in"] | None = None,
    residual: Float[Array, "batch tokens hidden"] | None = None,
) -> MomentSums:
    """The sums over one batch of sequences.

    Args:
      x: the input in the quantized model.
      original: the input in the original model; None without a refit.
      residual: h₀ − h, see `Drift`.
    """
    hessians = [upper_hessian(sequence[None]) for sequence in x]
    return MomentSums(
        hessian=reduce(jnp.add, hessians),
        drift=None if original is None else drift_sums(x, original, residual),
        correlations=reduce(jnp.add, map(squared_correlations, hessians)),
    )


def complete(sums: MomentSums, sequences: int) -> InputMoments:
    """The moments of an input, from the sums over all of its `sequences`."""
    return InputMoments(symmetric(sums.hessian), sums.drift, sampling_noise(sums, sequences))


def sampling_noise(sums: MomentSums, sequences: int | Float[Array, ""]) -> Float[Array, ""]:
    """ρ = Σ_{i≠j} Var(r_ij) / Σ_{i≠j} r_ij², where r are the correlations in H; 0 for a single sequence.

    The variance of a mean over sequences follows from how the sequences differ:
    Σ Var(r_ij) = (mean over sequences of Σ r_ij² − Σ r_ij²) / (sequences − 1).
    Multiplying all correlations by 1 − ρ minimizes the sum of their expected squared errors.

    Source: Schäfer and Strimmer 2005, A shrinkage approach to large-scale covariance matrix estimation, target D. A
    sequence counts as one observation, because its tokens are not independent.
    """
    if isinstance(sequences, int) and sequences == 1:
        return jnp.zeros(())
    whole = jnp.sum(squared_correlations(sums.hessian))
    single = jnp.sum(sums.correlations) / sequences
    share = (single - whole) / (sequences - 1) / jnp.where(whole == 0, 1, whole)
    if not isinstance(sequences, int):
        share = jnp.where(sequences > 1, share, 0)
    # Few digits: sums in another order, as on several devices, must not give other codes.
    return rounded(jnp.clip(share, 0, 1), jnp.bfloat16)


def upper_hessian(x: Float[Array, "batch tokens in"]) -> Float[Array, "in in"]:
    """Σ x xᵀ, of which only the upper triangle of blocks is computed."""
    panel = x.shape[-1] // PANELS
    panels = [
        jnp.pad(sum_of_products(x[..., start : start + panel], x[..., start:]), ((0, 0), (start, 0)))
        for start in range(0, panel * PANELS, panel)
    ]
    return jnp.concatenate(panels)


def squared_correlations(hessian: Float[Array, "in in"]) -> Float[Array, "in 1"]:
    """Σ_{j>i} r_ij² of each feature i; a feature that is always 0 has no correlations."""
    diagonal = jnp.diag(hessian)
    norm = jnp.where(diagonal > 0, jax.lax.rsqrt(diagonal), 0)
    return jnp.sum(jnp.triu(jnp.square(hessian * norm[:, None] * norm), 1), axis=1, keepdims=True)
