"""The solver of one matrix, or of several that share an input: SpQR, and GPTQ and round-to-nearest as settings of it.

Source: Dettmers et al. 2023 (arXiv 2306.03078), Algorithm 1; Frantar et al. 2022 (GPTQ) for the error correction.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pallas_kernels import SpqrTensor, trim
from pallas_kernels.errors import SpqrError
from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.checks import check_matrix
from spqr_jax.quantization.columns import solve
from spqr_jax.quantization.factorize import Factor, factorize, identity_factor, in_order
from spqr_jax.quantization.packing import dense_weight, pack_solution, rows_of
from spqr_jax.quantization.thresholds import threshold_of_rows, thresholds
from spqr_jax.runtime.lapack import in_one_thread
from spqr_jax.runtime.placement import ONE_DEVICE, Placement
from spqr_jax.runtime.x64 import in_32_bits


@in_32_bits
def quantize_matrix(
    weight: Float[Array | np.ndarray, "out in"],
    hessian: Float[Array | np.ndarray, "in in"] | None,
    config: SpqrConfig,
) -> SpqrTensor:
    """Quantizes one weight for inputs with the Hessian H = Σ x xᵀ, minimizing ‖(W − Ŵ) X‖².

    Under `jax.jit` the outlier arrays keep room for every weight; cut them afterwards with `pallas_kernels.trim`.

    Args:
      weight: W.
      hessian: H, or any positive multiple of it; None rounds to nearest.
      config: what to quantize to.

    Raises:
      SpqrError: the sizes do not fit the format, or a value is not finite, or the Hessian cannot be factorized.

    Source: Dettmers et al. 2023 (arXiv 2306.03078), Algorithm 1.

    Example:
      >>> packed = quantize_matrix(weight, hessian, COMPACT)
      >>> error = spqr_dequantize(packed) - weight
      >>> float(jnp.vdot(error, error @ hessian) / jnp.vdot(weight, weight @ hessian)) < 0.01
      True
    """
    check_matrix("weight", weight, config)
    (packed,), _, finite = quantize_shared((weight,), hessian, config)
    if isinstance(finite, jax.core.Tracer):
        return packed
    if not finite:
        raise SpqrError("the Hessian cannot be factorized: it has NaNs, or is far from positive definite")
    return trim(packed)


def quantize_shared(
    weights: tuple[Float[Array | np.ndarray, "_ in"], ...],
    hessian: Float[Array | np.ndarray, "in in"] | None,
    config: SpqrConfig,
    placement: Placement = ONE_DEVICE,
    shrinkage: Float[ArrayLike, ""] = 0.0,
) -> tuple[tuple[SpqrTensor, ...], tuple[Float[Array, "_ in"], ...], Bool[Array, ""]]:
    """Quantizes matrices that share an input, in one solve over all their rows.

    Args:
      weights: the matrices; on a mesh, spread over its devices by rows.
      hessian: H of their input; None rounds to nearest.
      config: what to quantize to.
      placement: devices that share the rows of each matrix, whole statistics groups each.
      shrinkage: share of diag H added to it, see `factorize`.

    Returns:
      The packed matrices, outliers not trimmed. On a mesh, each is the stack of its devices' parts, see
        `pallas_kernels.split_rows`, with rows of zeros at the end of a matrix that does not divide.
      The dequantized matrices, spread like the weights.
      Whether the Hessian could be factorized.
    """
    # A program of its own: inputs of one size feed different matrices, and the memory of one is free for the other.
    factor = None if hessian is None else in_one_thread(factorize, hessian, config, shrinkage)
    return quantize_factored(weights, factor, config, placement)


@partial(jax.jit, static_argnames=("config", "placement"))
def quantize_factored(
    weights: tuple[Float[Array, "_ in"], ...], factor: Factor | None, config: SpqrConfig, placement: Placement
) -> tuple[tuple[SpqrTensor, ...], tuple[Float[Array, "_ in"], ...], Bool[Array, ""]]:
    """`quantize_shared` after the factorization; None rounds to nearest."""
    if factor is None:
        factor = identity_factor(weights[0].shape[1])
    ordered = tuple(in_order(weight.astype(jnp.float32), factor) for weight in weights)
    limits = thresholds(ordered, factor, config, placement)
    rows = partial(_quantize_rows, config, placement.mesh is not None)
    packed, dense = placement.by_rows(rows, ordered, limits, factor, unit=config.stats_group_size)
    dense = tuple(d[: len(w)] for d, w in zip(dense, weights, strict=True))
    return packed, dense, jnp.isfinite(factor.inverse_factor).all()


def _quantize_rows(
    config: SpqrConfig,
    as_part: bool,
    ordered: tuple[Float[Array, "_ in"], ...],
    limits: list[Float[Array, ""]] | None,
    factor: Factor,
) -> tuple[tuple[SpqrTensor, ...], tuple[Float[Array, "_ in"], ...]]:
    """Solves and packs matrices whose columns are in quantization order; parts of a mesh get a leading axis."""
    threshold = None
    if limits is not None:
        threshold = jnp.concatenate(
            [threshold_of_rows(w, t, factor, config) for w, t in zip(ordered, limits, strict=True)]
        )
    solution = solve(jnp.concatenate(ordered), factor.inverse_factor, threshold, config)
    starts = [0, *itertools.accumulate(len(w) for w in ordered)]
    parts = [rows_of(solution, start, stop) for start, stop in itertools.pairwise(starts)]
    packed = tuple(pack_solution(part, factor, config) for part in parts)
    if as_part:
        packed = jax.tree.map(lambda array: array[None], packed)
    return packed, tuple(dense_weight(part, factor, config) for part in parts)
