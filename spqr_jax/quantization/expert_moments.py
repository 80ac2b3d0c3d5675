"""Second moments of the inputs of experts: of the tokens that each has got, and of all of them together."""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spqr_jax.models.experts import group_rows, rows_of_experts
from spqr_jax.quantization.linalg import symmetric
from spqr_jax.quantization.moments import (
    FEATURES_PER_TOKEN,
    InputMoments,
    MomentSums,
    sampling_noise,
    squared_correlations,
    upper_hessian,
)


class ExpertMoments(NamedTuple):
    """Moments of the inputs of all experts; the last ones are of all experts' tokens together.

    Attributes:
      hessians: H of each.
      sampling_noise: ρ of each, see `InputMoments`.
      tokens: how many each has got.
    """

    hessians: Float[Array, "sets in in"]
    sampling_noise: Float[Array, " sets"]
    tokens: Float[Array, " sets"]

    def of(self, expert: int) -> tuple[InputMoments, Bool[Array, ""]]:
        """The moments to solve an expert's matrices with, and whether they are those of all experts' tokens.

        They are where the expert has got fewer tokens than an eighth of its input features. Experts are not refitted:
        the original model may send a token to others.
        """
        pooled = self.tokens[expert] * FEATURES_PER_TOKEN < self.hessians.shape[-1]
        index = jnp.where(pooled, len(self.hessians) - 1, expert)
        return InputMoments(self.hessians[index], None, self.sampling_noise[index]), pooled


def expert_sums(
    x: Float[Array, "batch tokens *choices in"], chosen: Int[Array, "batch tokens count"], experts: int
) -> MomentSums:
    """The sums over one batch of sequences for each expert, and for all together, one below the other.

    Args:
      x: one input for each token, or one for each token and choice.
      chosen: experts of each token.
      experts: their number.
    """
    sequences = [_of_sequence(own, choice, experts) for own, choice in zip(x, chosen, strict=True)]
    return jax.tree.map(lambda *sums: reduce(jnp.add, sums), *sequences)


def complete_experts(sums: MomentSums) -> ExpertMoments:
    """The moments of all experts, from the sums over all sequences."""
    features = sums.hessian.shape[-1]
    assert sums.counts is not None
    hessians, correlations, counts = (
        array.reshape(-1, features, array.shape[-1]) for array in (sums.hessian, sums.correlations, sums.counts)
    )

    def noise(hessian: Array, correlations: Array, counts: Array) -> Float[Array, ""]:
        return sampling_noise(MomentSums(hessian, None, correlations), counts[0, 1])

    return ExpertMoments(
        hessians=jax.vmap(symmetric)(hessians),
        sampling_noise=jax.vmap(noise)(hessians, correlations, counts),
        tokens=counts[:, 0, 0],
    )


def _of_sequence(x: Float[Array, "tokens *choices in"], chosen: Int[Array, "tokens count"], experts: int) -> MomentSums:
    inputs, repeated = rows_of_experts(x, chosen)
    features = inputs.shape[-1]
    groups = group_rows(chosen.reshape(-1), experts)

    def add(
        hessians: Float[Array, "experts in in"], group: tuple[Int[Array, ""], Int[Array, " places"]]
    ) -> tuple[Array, None]:
        expert, rows = group
        # Empty places are rows of zeros.
        own = jnp.take(inputs, rows // repeated, axis=0, mode="fill", fill_value=0)
        return hessians.at[expert].add(upper_hessian(own[None])), None

    # Like the inputs, which differ from device to device.
    zeros = jnp.zeros_like(inputs, jnp.float32, shape=(experts, features, features))
    hessians = jax.lax.scan(add, zeros, (groups.experts, groups.rows))[0]
    hessians = jnp.concatenate([hessians, jnp.sum(hessians, axis=0, keepdims=True)])
    tokens = jnp.bincount(chosen.reshape(-1), length=experts)
    tokens = jnp.append(tokens, jnp.sum(tokens)).astype(jnp.float32)
    counts = jnp.stack([tokens, (tokens > 0).astype(jnp.float32)], axis=-1)
    return MomentSums(
        hessian=hessians.reshape(-1, features),
        drift=None,
        correlations=jax.vmap(squared_correlations)(hessians).reshape(-1, 1),
        # Once in the rows of each expert.
        counts=jnp.repeat(counts, features, axis=0),
    )
