"""The outlier threshold that gives a model a target size.

Every outlier takes 32 bits, so bits per weight are those without outliers plus 32 times the share of outliers. That
share as a function of τ comes from one pass over the original model, which solves each matrix with a few thresholds on
one Hessian. The pass does not see how inputs change once earlier blocks are quantized; one measured size corrects that.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.interpolate import PchipInterpolator

from pallas_kernels import SpqrTensor
from pallas_kernels.errors import SpqrError
from spqr_jax.config import COMPACT, NEAR_LOSSLESS, SMALL, SpqrConfig
from spqr_jax.models.decoder import layer_name
from spqr_jax.models.experts import kernel_of
from spqr_jax.quantization.columns import solve
from spqr_jax.quantization.factorize import Factor, factorize, in_order
from spqr_jax.quantization.solver import quantize_matrix
from spqr_jax.quantization.thresholds import outlier_threshold
from spqr_jax.quantization.walk import walk_original
from spqr_jax.runtime.lapack import in_one_thread
from spqr_jax.runtime.x64 import in_32_bits
from spqr_jax.search.size_search import Choice, Try, goal_of_bits, quantize_to_size
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import BlockReport

THRESHOLDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Thresholds with which the pass solves every matrix."""

BITS_PER_OUTLIER = 32
"""16 of its value and 16 of its column."""

SETTINGS: tuple[SpqrConfig, ...] = (
    *(SpqrConfig(group_size=size, stats_group_size=32, fit="error", embedding_bits=8) for size in (64, 32)),
    SMALL,
    COMPACT,
    NEAR_LOSSLESS,
)
"""From small to large; where two of them can give a size, the later one is better."""


class Curve(NamedTuple):
    """The share of outliers of a whole model by threshold.

    Attributes:
      bits_without_outliers: bits per weight of the packed matrices without outliers, with row offsets and permutations.
      thresholds: τ, rising.
      shares: outliers / weights at each, falling.
    """

    bits_without_outliers: float
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]


@in_32_bits
def outlier_curve(
    source: ModelSource,
    calibration_tokens: Int[np.ndarray, "sequences tokens"],
    config: SpqrConfig,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Curve:
    """Counts outliers by threshold in one pass over the original model, one block in memory at a time.

    Args:
      source: the model.
      calibration_tokens: token ids of sequences of equal length.
      config: what to quantize to; its threshold is ignored.
      thresholds: τ, rising.

    Raises:
      SpqrError: as for `walk_original`.

    Example:
      >>> curve = outlier_curve(source, calibration, COMPACT, thresholds=(0.1, 1.0))
      >>> curve.shares[0] > curve.shares[1]
      True
    """
    some = replace(config, outlier_threshold=1.0)
    # Without the original model beside it: the refit changes these counts little.
    counts, weights, size = np.zeros(len(thresholds)), 0, 0
    for _, params, shared in walk_original(source.model, source.parts, calibration_tokens, config):
        kernels = tuple(kernel_of(params, matrix) for matrix in shared.matrices)
        moments = shared.take_moments()
        factor = in_one_thread(factorize, moments.hessian, config, config.shrinkage * moments.sampling_noise)
        del moments
        counts += np.asarray(outlier_counts(kernels, factor, jnp.asarray(thresholds), config))
        weights += sum(kernel.size for kernel in kernels)
        size += sum(bytes_without_outliers(kernel.shape, some) for kernel in kernels)
    return Curve(8 * size / weights, tuple(thresholds), tuple((counts / weights).tolist()))


def threshold_for(curve: Curve, target_bits: float, measured: tuple[float, float] | None = None) -> float:
    """The threshold τ at which bits without outliers + 32 · share(τ) is the target.

    Between the thresholds of the curve, log share is interpolated monotonically over log τ.

    Args:
      curve: of `outlier_curve`.
      target_bits: bits per weight.
      measured: a threshold, and the bits per weight of the model quantized with it; the curve is shifted through this
        point.

    Raises:
      SpqrError: no threshold in the curve's range gives that size.

    Example:
      >>> curve = Curve(3.5, (0.1, 1.0), (0.04, 0.01))
      >>> round(threshold_for(curve, target_bits=4.14), 3)
      0.316
      >>> round(threshold_for(curve, target_bits=4.14, measured=(0.316, 4.16)), 3)
      0.333
    """
    # The logarithm of 0 is infinite; a share below one outlier in a billion weights counts as that.
    log_shares = np.log(np.maximum(curve.shares, 1e-9))
    interpolate = PchipInterpolator(np.log(curve.thresholds), log_shares)
    shift = 0.0
    if measured is not None:
        threshold, bits = measured
        share = max((bits - curve.bits_without_outliers) / BITS_PER_OUTLIER, 1e-9)
        shift = math.log(share) - float(interpolate(math.log(threshold)))
    smallest, largest = (
        curve.bits_without_outliers + BITS_PER_OUTLIER * math.exp(log_shares[end] + shift) for end in (-1, 0)
    )
    if not smallest <= target_bits <= largest:
        raise SpqrError(
            f"no outlier threshold gives {target_bits} bits per weight, these settings only {smallest:.2f} to "
            f"{largest:.2f}: give larger groups or fewer bits for less, the opposite for more"
        )
    wanted = math.log((target_bits - curve.bits_without_outliers) / BITS_PER_OUTLIER) - shift
    return math.exp(min(interpolate.solve(wanted, extrapolate=False), key=abs))


@in_32_bits
def settings_for(source: ModelSource, target_bits: float) -> SpqrConfig:
    """The last of `SETTINGS` whose size without outliers is at most the target, or the smallest if none is.

    Only settings whose groups divide the model's features and rows are considered.

    Example:
      >>> settings_for(source, 3.9).bits
      3
    """
    shapes = kernel_shapes(source)

    def fits(config: SpqrConfig) -> bool:
        size = sum(bytes_without_outliers(shape, config) for shape in shapes)
        return 8 * size <= target_bits * sum(map(math.prod, shapes))

    possible = dividing(shapes, SETTINGS)
    return next(filter(fits, reversed(possible)), possible[0])


def kernel_shapes(source: ModelSource) -> list[tuple[int, int]]:
    """Shapes `(in, out)` of the matrices of a block."""
    params = source.parts[layer_name(0)]()
    kernels = [params[layer]["kernel"] for layer in source.model.new_block().matrices()]
    return [kernel.shape[-2:] for kernel in kernels for _ in range(math.prod(kernel.shape[:-2]))]


def dividing(shapes: Sequence[tuple[int, int]], settings: Sequence[SpqrConfig]) -> Sequence[SpqrConfig]:
    """The settings whose groups divide matrices of these shapes `(in, out)`; if none do, the first, for its error."""

    def divides(config: SpqrConfig) -> bool:
        return all(columns % config.group_size == out % config.stats_group_size == 0 for columns, out in shapes)

    return list(filter(divides, settings)) or settings[:1]


def quantize_to_bits(
    source: ModelSource,
    destination: Path,
    calibration_tokens: Int[np.ndarray, "sequences tokens"],
    *,
    config: SpqrConfig,
    target_bits: float,
    overwrite: bool = False,
    **options: Any,
) -> list[BlockReport]:
    """Quantizes a model to `target_bits` per weight, within 0.02, by searching the outlier threshold.

    The first threshold is that of `outlier_curve`. Where the measured size differs, it corrects the curve, and the
    model is quantized again; see `quantize_to_size`.

    Args:
      source: the model.
      destination: directory of the checkpoint.
      calibration_tokens: token ids of sequences of equal length.
      config: what to quantize to; its threshold is ignored.
      target_bits: bits per weight of the packed matrices.
      overwrite: replace an existing checkpoint.
      options: further arguments of `quantize_checkpoint`.

    Raises:
      SpqrError: no threshold gives that size, or four tried ones did not; or as for `quantize_checkpoint`.
    """

    def choose(curve: list[Any], tried: Sequence[Try]) -> Choice:
        threshold = threshold_for(Curve(*curve), target_bits, tried[-1] if tried else None)
        return Choice(threshold, replace(config, outlier_threshold=threshold))

    return quantize_to_size(
        source,
        destination,
        calibration_tokens,
        goal=goal_of_bits(target_bits),
        survey=lambda: outlier_curve(source, calibration_tokens, config),
        choose=choose,
        description={"config": dataclasses.asdict(config), "target_bits": target_bits},
        overwrite=overwrite,
        **options,
    )


@partial(jax.jit, static_argnames="config")
def outlier_counts(
    kernels: tuple[Float[Array, "in _"], ...], factor: Factor, thresholds: Float[Array, " n"], config: SpqrConfig
) -> Int[Array, " n"]:
    """The number of outliers of matrices that share an input, for each threshold τ."""
    ordered = tuple(in_order(kernel.T, factor) for kernel in kernels)
    units = jnp.concatenate(
        [jnp.full(len(weight), outlier_threshold(weight, factor.inverse_factor, 1.0)) for weight in ordered]
    )
    weight = jnp.concatenate(ordered)

    def count(threshold: Float[Array, ""]) -> Int[Array, ""]:
        outliers: Any = solve(weight, factor.inverse_factor, threshold * units, config).outliers
        return outliers[0].sum()

    return jax.lax.map(count, thresholds)


def bytes_without_outliers(kernel_shape: tuple[int, int], config: SpqrConfig) -> int:
    """Bytes of a packed matrix of this shape `(in, out)`, outliers not counted.

    Example:
      >>> 8 * bytes_without_outliers((64, 64), SpqrConfig()) / 64**2
      4.38...
    """
    columns, out = kernel_shape
    shapes = jax.ShapeDtypeStruct((out, columns), jnp.float32), jax.ShapeDtypeStruct((columns, columns), jnp.float32)
    packed = jax.eval_shape(partial(quantize_matrix, config=config), *shapes)
    return trimmed_bytes(packed, 0)


def trimmed_bytes(packed: SpqrTensor, outliers: int) -> int:
    """Bytes of a packed matrix with room for this number of outliers."""
    room = 0 if packed.outliers is None else packed.outliers.capacity
    return packed.nbytes - (room - outliers) * BITS_PER_OUTLIER // 8
