"""The sensitivity of each weight of a model: the least error that rounding it alone can cause.

Source: Dettmers et al. 2023 (arXiv 2306.03078), section 3, formula 2.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import SpqrError
from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Block, layer_name
from spqr_jax.models.experts import kernel_of
from spqr_jax.quantization.checks import check_matrix
from spqr_jax.quantization.factorize import Factor, factorize
from spqr_jax.quantization.group_fit import decode, encode, fit_group
from spqr_jax.quantization.thresholds import outlier_threshold
from spqr_jax.quantization.walk import walk_original
from spqr_jax.runtime.lapack import in_one_thread
from spqr_jax.runtime.x64 import in_32_bits, steps_in_32_bits
from spqr_jax.storage.model_source import ModelSource


class Sensitivity(NamedTuple):
    """The sensitivities of one matrix.

    Attributes:
      values: s of every weight, see `sensitivity`; columns in the order of the input features.
      outlier_share: share of the weights that the solver's rule makes outliers: (w − ŵ)² / U_jj² > T with H⁻¹ = Uᵀ U
        in quantization order and T of `outlier_threshold`; 0 without a threshold. Groups are fitted as in the solver,
        without likely outliers (unless `simplified`), but no weight carries the errors of earlier columns.
    """

    values: Float[Array, "out in"]
    outlier_share: Float[Array, ""]


class Heads(NamedTuple):
    """The attention heads of a matrix: `width` neighbouring rows (axis 0) or columns (axis 1) each."""

    axis: Literal[0, 1]
    width: int


class Matrix(NamedTuple):
    """The sensitivities of one matrix of a model.

    Attributes:
      kind: its name in its block, `q_proj`.
      depth: index of its block.
      sensitivity: with H = Σ x xᵀ / tokens.
      heads: None where neither its rows nor its columns belong to attention heads.
    """

    kind: str
    depth: int
    sensitivity: Sensitivity
    heads: Heads | None

    @property
    def name(self) -> str:
        """`layers_3.q_proj`."""
        return f"{layer_name(self.depth)}.{self.kind}"


@in_32_bits
def sensitivity(
    weight: Float[Array | np.ndarray, "out in"], hessian: Float[Array | np.ndarray, "in in"], config: SpqrConfig
) -> Sensitivity:
    """s_ij = (w_ij − ŵ_ij)² / (2 [H⁻¹]_jj): half the least ‖W X − W' X‖² of all W' with w'_ij = ŵ_ij, H = X Xᵀ.

    ŵ is w rounded to nearest, in the configuration's groups and with its statistics. H is damped as in the solver.
    Weights of features that are always 0 have sensitivity 0.

    Args:
      weight: W.
      hessian: H; a positive multiple of it multiplies s.
      config: what to quantize to.

    Raises:
      SpqrError: the sizes do not fit the format, or a value is not finite, or the Hessian cannot be factorized.

    Source: Dettmers et al. 2023 (arXiv 2306.03078), formula 2.

    Example:
      >>> found = sensitivity(weight, hessian, COMPACT)
      >>> found.values.shape == weight.shape
      True
    """
    check_matrix("weight", weight, config)
    return _of_factored(weight, _factor("weight", hessian, config), config)


@steps_in_32_bits
def sensitivities(
    source: ModelSource, calibration_tokens: Int[ArrayLike, "sequences tokens"], config: SpqrConfig
) -> Iterator[Matrix]:
    """Yields the sensitivities of all matrices of a model in order, on the inputs of the original model.

    One block's weights are in memory at a time, beside the hidden states of the calibration sequences.

    Raises:
      SpqrError: as for `quantize`.

    Example:
      >>> means = {m.name: m.sensitivity.values.mean() for m in sensitivities(source, calibration, COMPACT)}
      >>> list(means)[:2]
      ['layers_0.q_proj', 'layers_0.k_proj']
    """
    heads = matrix_heads(source.model.new_block())
    tokens = np.asarray(calibration_tokens)
    for depth, params, shared in walk_original(source.model, source.parts, tokens, config):
        name = f"{layer_name(depth)}: the input of {', '.join(shared.matrices)}"
        factor = _factor(name, shared.take_moments().hessian / tokens.size, config)
        for kind in shared.matrices:
            found = _of_factored(kernel_of(params, kind).T, factor, config)
            yield Matrix(kind, depth, found, heads.get(kind))


def matrix_heads(block: Block) -> dict[str, Heads]:
    """The matrices of a block whose rows or columns belong to attention heads.

    Example:
      >>> matrix_heads(model.new_block())["o_proj"]
      Heads(axis=1, width=16)
    """
    width = block.config.head_dim
    rows = dict.fromkeys(block.heads(), Heads(0, width))
    return rows | dict.fromkeys(block.feeds()["attention_output"], Heads(1, width))


def _factor(name: str, hessian: Float[Array | np.ndarray, "in in"], config: SpqrConfig) -> Factor:
    factor = in_one_thread(factorize, hessian, config)
    if not jnp.isfinite(factor.inverse_factor[0, 0]):  # a failed factorization is NaN throughout
        raise SpqrError(f"{name}: the Hessian cannot be factorized: it has NaNs, or is far from positive definite")
    return factor


@partial(jax.jit, static_argnames="config")
def _of_factored(weight: Float[Array, "out in"], factor: Factor, config: SpqrConfig) -> Sensitivity:
    if factor.permutation is not None:
        weight = weight[:, factor.permutation]
    weight = jnp.where(factor.dead, 0, weight)
    diagonal = jnp.diag(factor.inverse_factor)
    share = jnp.zeros(())
    if config.outlier_threshold is not None:
        threshold = outlier_threshold(weight, factor.inverse_factor, config.outlier_threshold)
        errors = weight - _round(weight, diagonal, jnp.full(len(weight), threshold), config)
        share = jnp.mean(jnp.where(factor.dead, 0, jnp.square(errors / diagonal)) > threshold)
    errors = jnp.where(factor.dead, 0, weight - _round(weight, diagonal, None, config))
    values = jnp.square(errors) / (2 * jnp.square(factor.inverse_factor).sum(axis=0))
    if factor.permutation is not None:
        values = values[:, jnp.argsort(factor.permutation)]
    return Sensitivity(values, share)


def _round(
    weight: Float[Array, "out in"],
    diagonal: Float[Array, " in"],
    threshold: Float[Array, " out"] | None,
    config: SpqrConfig,
) -> Float[Array, "out in"]:
    """The weight rounded to nearest, columns in quantization order; for the threshold see `fit_group`."""
    size = config.group_size

    def of_group(inputs: tuple[Array, Array]) -> Float[Array, "group out"]:
        group, own = inputs
        scale, zero, _ = fit_group(group, own, threshold, config)
        return decode(encode(group, scale, zero, config.bits), scale, zero)

    groups = weight.T.reshape(-1, size, len(weight)), diagonal.reshape(-1, size)
    return jax.lax.map(of_group, groups).reshape(weight.T.shape).T
