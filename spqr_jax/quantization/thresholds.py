"""Which weights become outliers: the thresholds that the solver compares sensitivities with.

Source: Dettmers et al. 2023 (arXiv 2306.03078), Algorithm 1; whole rows are from its ablation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.factorize import Factor
from spqr_jax.quantization.group_fit import decode, encode, min_max_fit
from spqr_jax.quantization.linalg import BLOCK_ROWS
from spqr_jax.runtime.placement import ONE_DEVICE, Placement


def thresholds(
    weights: tuple[Float[Array, "_ in"], ...], factor: Factor, config: SpqrConfig, placement: Placement
) -> list[Float[Array, ""]] | None:
    """A threshold per matrix, in the units of (w − ŵ)² / U_jj² or of whole rows; None without outliers."""
    if config.outlier_threshold is not None:
        relative = config.outlier_threshold
        return [outlier_threshold(w, factor.inverse_factor, relative, placement) for w in weights]
    if config.outlier_rows is not None:
        return [row_threshold(w, factor.inverse_factor, config, placement) for w in weights]
    return None


def outlier_threshold(
    weight: Float[Array, "out in"],
    inverse_factor: Float[Array, "in in"],
    relative_threshold: float,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, ""]:
    """T = τ · mean_i(Var_rows(W[:, i]) / U_ii²), variance unbiased; the weight in quantization order, dead ones 0."""

    def sum_rows(values: Float[Array, "out in"]) -> Float[Array, " in"]:
        # In two steps, so that the order of the sum does not depend on which device has the rows.
        padded = jnp.pad(values, ((0, -len(values) % BLOCK_ROWS), (0, 0)))
        blocks = padded.reshape(-1, BLOCK_ROWS, values.shape[1]).sum(axis=1)
        return jax.lax.optimization_barrier(placement.gather(blocks)).sum(axis=0)

    mean = sum_rows(weight) / len(weight)
    variance = sum_rows(jnp.square(weight - mean)) / (len(weight) - 1)
    return relative_threshold * jnp.mean(variance / jnp.square(jnp.diag(inverse_factor)))


def row_threshold(
    weight: Float[Array, "out in"],
    inverse_factor: Float[Array, "in in"],
    config: SpqrConfig,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, ""]:
    """The sensitivity that the share `config.outlier_rows` of the rows exceeds, see `row_sensitivities`."""
    assert config.outlier_rows is not None
    falling = jnp.sort(placement.gather(row_sensitivities(weight, inverse_factor, config)), descending=True)
    kept = round(config.outlier_rows * len(weight))
    # Halfway between two rows, so that rounding does not decide.
    bounds = jnp.concatenate([jnp.full(1, jnp.inf), (falling[:-1] + falling[1:]) / 2, jnp.full(1, -jnp.inf)])
    return bounds[kept]


def row_sensitivities(
    weight: Float[Array, "out in"], inverse_factor: Float[Array, "in in"], config: SpqrConfig
) -> Float[Array, " out"]:
    """Σ_j (w_j − ŵ_j)² / U_jj² of each row, rounded to nearest with statistics that are not quantized."""
    columns = weight.shape[1]
    groups = weight.T.reshape(columns // config.group_size, config.group_size, -1)
    fit = min_max_fit(groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True), config.bits)
    errors = jnp.square(groups - decode(encode(groups, *fit, config.bits), *fit)).reshape(columns, -1)
    return jnp.sum(errors / jnp.square(jnp.diag(inverse_factor))[:, None], axis=0)


def threshold_of_rows(
    weight: Float[Array, "out in"], threshold: Float[Array, ""], factor: Factor, config: SpqrConfig
) -> Float[Array, " out"]:
    """T of each row; negative for a row that is kept whole."""
    if config.outlier_rows is None:
        return jnp.full(len(weight), threshold)
    return jnp.where(row_sensitivities(weight, factor.inverse_factor, config) > threshold, -1.0, jnp.inf)
