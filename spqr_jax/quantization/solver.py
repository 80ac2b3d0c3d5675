"""The solver of one matrix: SpQR, and GPTQ and round-to-nearest as settings of it.

Source: Dettmers et al. 2023 (arXiv 2306.03078), Algorithm 1; Frantar et al. 2022 (GPTQ) for the error correction.
Inside, a weight is kept transposed, `[in, out]`: a column's work is then on contiguous memory.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels import QuantizedStatistics, SpqrTensor, check_format, pack, trim
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import Statistics
from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.group_fit import (
    decode,
    encode,
    least_error_fit,
    leave_one_out_gain,
    min_max_fit,
    quantize_statistics,
    rounded,
)
from spqr_jax.quantization.linalg import upper_cholesky, upper_inverse, upper_square
from spqr_jax.runtime.devices import by_rows, gather
from spqr_jax.runtime.lapack import in_one_thread

BLOCK_COLUMNS = 128
"""Columns after which errors are carried to the whole rest of the matrix."""

BLOCK_ROWS = 16
"""Rows that are summed or multiplied together whichever device has them, so that all are rounded alike."""

LARGEST_WEIGHT = 2.0**14
"""A quarter of float16's range: room for residuals and for the corrections of other columns' errors."""


def quantize_matrix(
    weight: Float[Array, "out in"], hessian: Float[Array, "in in"] | None, config: SpqrConfig
) -> SpqrTensor:
    """Quantizes one weight for inputs with Hessian H = Σ x xᵀ (any positive multiple); None is round-to-nearest.

    Under `jax.jit` the outlier arrays keep room for every weight; `pallas_kernels.trim` cuts them afterwards.

    Raises:
      SpqrError: the sizes do not fit the format, or a value is not finite, or the Hessian cannot be factorized.

    Example:
      >>> packed = quantize_matrix(kernel.T, x.T @ x, COMPACT)
      >>> error = spqr_dequantize(packed) - kernel.T
    """
    check_matrix("weight", weight, config)
    (packed,), _, finite = quantize_shared((weight,), hessian, config)
    if isinstance(finite, jax.core.Tracer):
        return packed
    if not finite:
        raise SpqrError("the Hessian cannot be factorized: it has NaNs, or is far from positive definite")
    return trim(packed)


def check_matrix(name: str, weight: Float[Array, "out in"], config: SpqrConfig) -> None:
    """Raises a SpqrError that names the matrix where its sizes do not fit the format or a value is not finite."""
    try:
        check_format(
            *weight.shape,
            bits=config.bits,
            group_size=config.group_size,
            scale_bits=config.scale_bits,
            zero_bits=config.zero_bits,
            stats_group_size=config.stats_group_size,
        )
    except SpqrError as error:
        raise SpqrError(f"{name}: {error}") from None
    check_finite(name, weight)
    if not isinstance(weight, jax.core.Tracer) and (largest := float(_largest(weight))) > LARGEST_WEIGHT:
        raise SpqrError(
            f"{name} has weights up to {largest:g}, but scales and outliers are float16: "
            f"scale it down to {LARGEST_WEIGHT:g}"
        )


def check_finite(name: str, array: Float[Array, "..."]) -> None:
    """Raises a SpqrError that names the array where a value is NaN or infinite; traced values pass."""
    if isinstance(array, jax.core.Tracer):
        return
    if bad := array.size - int(_count_finite(array)):
        raise SpqrError(f"{name} has {bad} values that are NaN or infinite")


@jax.jit
def _largest(array: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.abs(array).max()


@jax.jit
def _count_finite(array: Float[Array, "..."]) -> Int[Array, ""]:
    return jnp.isfinite(array).sum()


class Factor(NamedTuple):
    """What the solver needs of a Hessian, in quantization order.

    Attributes:
      inverse_factor: U, upper triangular, with H⁻¹ = Uᵀ U after damping.
      dead: features that never occurred in the calibration data.
      permutation: quantization order → input feature, or None for the identity.
    """

    inverse_factor: Float[Array, "in in"]
    dead: Bool[Array, " in"]
    permutation: Int[Array, " in"] | None


class Solution(NamedTuple):
    """A solved matrix in quantization order: ŵ = scale · (code − zero), plus the residual at an outlier.

    Attributes:
      outliers: which weights are outliers, and the residuals w − scale · (code − zero), w being the weight with all
        earlier columns' corrections; None without a threshold.
    """

    codes: UInt8[Array, "out in"]
    scale: Statistics
    zero: Statistics
    outliers: tuple[Bool[Array, "out in"], Float[Array, "out in"]] | None


@partial(jax.jit, static_argnames="config")
def factorize(hessian: Float[Array, "in in"], config: SpqrConfig, shrinkage: Float[ArrayLike, ""] = 0.0) -> Factor:
    """Damps and inverts a Hessian: U with (H + damping · mean|diag H| + shrinkage · diag H)⁻¹ = Uᵀ U.

    Features are in quantization order.

    Where the factorization fails, damps ten times more, up to three times; U is NaN if that does not help.
    """
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diag(hessian)
    permutation = None
    if config.permutation == "act_order":
        permutation = jnp.argsort(-diagonal)
        # One gather for rows and columns: after two, XLA walks through the result against its order in memory.
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


def quantize_shared(
    weights: tuple[Float[Array, "_ in"], ...],
    hessian: Float[Array, "in in"] | None,
    config: SpqrConfig,
    mesh: Mesh | None = None,
    shrinkage: Float[ArrayLike, ""] = 0.0,
) -> tuple[tuple[SpqrTensor, ...], tuple[Float[Array, "_ in"], ...], Bool[Array, ""]]:
    """Quantizes matrices that share an input, in one solve over all their rows.

    Args:
      weights: the matrices; on a mesh, spread over its devices by rows.
      hessian: H of their input, or None.
      config: what to quantize to.
      mesh: devices that share the rows of each matrix, whole statistics groups each.
      shrinkage: share of diag H added to it, see `factorize`.

    Returns:
      The packed matrices, outliers not trimmed; on a mesh, each as the stack of its devices' parts, see
      `pallas_kernels.split_rows`, with rows of zeros at the end of a matrix that does not divide.
      What `dequantize` makes of them, spread like the weights.
      Whether the Hessian could be factorized.
    """
    # Programs of their own: different matrices have inputs of one size, and the memory of one is free for the other.
    factor = None if hessian is None else in_one_thread(factorize, hessian, config, shrinkage)
    return _quantize_factored(weights, factor, config, mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _quantize_factored(
    weights: tuple[Float[Array, "_ in"], ...], factor: Factor | None, config: SpqrConfig, mesh: Mesh | None
) -> tuple[tuple[SpqrTensor, ...], tuple[Float[Array, "_ in"], ...], Bool[Array, ""]]:
    """`quantize_shared` after the factorization; None is round-to-nearest."""
    if factor is None:
        columns = weights[0].shape[1]
        factor = Factor(jnp.eye(columns), jnp.zeros(columns, bool), None)
    ordered = tuple(in_order(weight.astype(jnp.float32), factor) for weight in weights)
    thresholds = None
    if config.outlier_threshold is not None:
        thresholds = [outlier_threshold(w, factor.inverse_factor, config.outlier_threshold, mesh) for w in ordered]
    elif config.outlier_rows is not None:
        thresholds = [row_threshold(w, factor.inverse_factor, config, mesh) for w in ordered]
    rows = partial(_quantize_rows, config, mesh is not None)
    packed, dense = by_rows(rows, mesh, ordered, thresholds, factor, unit=config.stats_group_size)
    dense = tuple(d[: len(w)] for d, w in zip(dense, weights, strict=True))
    return packed, dense, jnp.isfinite(factor.inverse_factor).all()


def _quantize_rows(
    config: SpqrConfig,
    as_part: bool,
    ordered: tuple[Float[Array, "_ in"], ...],
    thresholds: list[Float[Array, ""]] | None,
    factor: Factor,
) -> tuple[tuple[SpqrTensor, ...], tuple[Float[Array, "_ in"], ...]]:
    """Solves and packs matrices whose columns are in quantization order; as parts, they get a leading axis."""
    threshold = None
    if thresholds is not None:
        threshold = jnp.concatenate(
            [_threshold_of_rows(w, t, factor, config) for w, t in zip(ordered, thresholds, strict=True)]
        )
    solution = solve(jnp.concatenate(ordered), factor.inverse_factor, threshold, config)
    starts = [0, *itertools.accumulate(len(w) for w in ordered)]
    parts = [_rows(solution, start, stop) for start, stop in itertools.pairwise(starts)]
    packed = tuple(_pack(part, factor, config) for part in parts)
    if as_part:
        packed = jax.tree.map(lambda array: array[None], packed)
    return packed, tuple(_dense(part, factor, config) for part in parts)


def outlier_threshold(
    weight: Float[Array, "out in"],
    inverse_factor: Float[Array, "in in"],
    relative_threshold: float,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """T = τ · mean_i(Var_rows(W[:, i]) / U_ii²), variance unbiased; the weight in quantization order, dead ones 0."""

    def sum_rows(values: Float[Array, "out in"]) -> Float[Array, " in"]:
        # In two steps, so that the order of the sum is the same wherever the rows are.
        padded = jnp.pad(values, ((0, -len(values) % BLOCK_ROWS), (0, 0)))
        blocks = padded.reshape(-1, BLOCK_ROWS, values.shape[1]).sum(axis=1)
        return jax.lax.optimization_barrier(gather(blocks, mesh)).sum(axis=0)

    mean = sum_rows(weight) / len(weight)
    variance = sum_rows(jnp.square(weight - mean)) / (len(weight) - 1)
    return relative_threshold * jnp.mean(variance / jnp.square(jnp.diag(inverse_factor)))


def row_threshold(
    weight: Float[Array, "out in"], inverse_factor: Float[Array, "in in"], config: SpqrConfig, mesh: Mesh | None = None
) -> Float[Array, ""]:
    """A sensitivity that the share `config.outlier_rows` of the rows exceeds, see `row_sensitivities`."""
    assert config.outlier_rows is not None
    falling = jnp.sort(gather(row_sensitivities(weight, inverse_factor, config), mesh), descending=True)
    kept = round(config.outlier_rows * len(weight))
    # Between two rows, so that no rounding decides.
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


def _threshold_of_rows(
    weight: Float[Array, "out in"], threshold: Float[Array, ""], factor: Factor, config: SpqrConfig
) -> Float[Array, " out"]:
    """T of each row; below zero where all of the row is to be kept."""
    if config.outlier_rows is None:
        return jnp.full(len(weight), threshold)
    return jnp.where(row_sensitivities(weight, factor.inverse_factor, config) > threshold, -1.0, jnp.inf)


def solve(
    weight: Float[Array, "out in"],
    inverse_factor: Float[Array, "in in"],
    threshold: Float[Array, " out"] | None,
    config: SpqrConfig,
) -> Solution:
    """Quantizes a weight column by column; each column's error is made up for by the later ones.

    Args:
      weight: in quantization order, float32.
      inverse_factor: U of `factorize`.
      threshold: T of each row (rows of several matrices can be solved together), below zero for a row to be kept
        whole, or None for no outliers.
    """
    out, columns = weight.shape
    size = config.group_size
    block = max(n for n in range(size, max(size, BLOCK_COLUMNS) + 1, size) if columns % n == 0)

    def solve_group(rest: Array, start: Array, u: Array) -> tuple[Array, tuple]:
        """Solves one group of a block; returns the block with later columns corrected, and the group's results."""
        group = jax.lax.dynamic_slice_in_dim(rest, start, size)
        factor_rows = jax.lax.dynamic_slice_in_dim(u, start, size)
        own = jax.lax.dynamic_slice_in_dim(factor_rows, start, size, axis=1)
        scale, zero, statistics = fit_group(group, jnp.diag(own), threshold, config)
        codes, outliers, errors = _quantize_columns(group, own, scale, zero, threshold, config)
        rest = rest - jnp.matmul(factor_rows.T, errors, precision="highest")
        return rest, (codes, outliers, errors, statistics)

    def solve_block(weight: Array, start: Array) -> tuple[Array, tuple]:
        u = jax.lax.dynamic_slice_in_dim(inverse_factor, start, block)
        here = jax.lax.dynamic_slice_in_dim(u, start, block, axis=1)
        rest = jax.lax.dynamic_slice_in_dim(weight, start, block)
        _, results = jax.lax.scan(lambda rest, s: solve_group(rest, s, here), rest, jnp.arange(0, block, size))
        codes, outliers, errors, statistics = results
        weight = weight - jnp.matmul(u.T, errors.reshape(block, out), precision="highest")
        return weight, (codes, outliers, statistics)

    _, results = jax.lax.scan(solve_block, weight.T, jnp.arange(0, columns, block))
    codes, outliers, (scale, zero) = results

    def by_row(values: Array) -> Array:
        return values.reshape(-1, values.shape[-1]).T

    return Solution(*jax.tree.map(by_row, (codes, scale, zero, outliers)))


def in_order(weight: Float[Array, "out in"], factor: Factor) -> Float[Array, "out in"]:
    """The weight's columns in quantization order, dead features' set to 0."""
    if factor.permutation is not None:
        weight = weight.T[factor.permutation].T  # rows are moved faster than columns
    return jnp.where(factor.dead, 0, weight)


def fit_group(
    group: Float[Array, "group out"],
    diagonal: Float[Array, " group"],
    threshold: Float[Array, " out"] | None,
    config: SpqrConfig,
) -> tuple[Array, Array, tuple[Statistics, Statistics]]:
    """Scale and zero of a group in each row, as they will be stored; likely outliers do not take part."""
    low, high = group.min(axis=0), group.max(axis=0)
    costs = jnp.broadcast_to(1 / jnp.square(diagonal)[:, None], group.shape)
    if threshold is not None and not config.simplified:
        gain = leave_one_out_gain(group, costs[:, 0], config.bits)
        # A row that is kept whole has statistics like the others: they are quantized together.
        likely = (gain > threshold) & (threshold >= 0)
        kept_low = jnp.where(likely, jnp.inf, group).min(axis=0)
        kept_high = jnp.where(likely, -jnp.inf, group).max(axis=0)
        # Where fewer than two values are left to fit, the official code's range.
        unfit = (kept_low >= kept_high) & (low < high)
        low, high = jnp.where(unfit, -1, kept_low), jnp.where(unfit, 1, kept_high)
        costs = jnp.where(likely, 0, costs)
    if config.fit == "error":
        # What would cost more than T becomes an outlier.
        most = jnp.full_like(low, jnp.inf) if threshold is None else jnp.where(threshold < 0, jnp.inf, threshold)
        scale, zero = least_error_fit(group, low, high, costs, most, config.bits)
    else:
        scale, zero = min_max_fit(low, high, config.bits)

    def store(values: Array, bits: int | None) -> tuple[Statistics, Array]:
        if bits is not None:
            return quantize_statistics(values, bits, config.stats_group_size, config.stats_dtype)
        stored = rounded(values, config.stats_dtype)
        return stored, stored

    stored_scale, scale = store(scale, config.scale_bits)
    stored_zero, zero = store(zero, config.zero_bits)
    return scale, zero, (stored_scale, stored_zero)


def _quantize_columns(
    group: Float[Array, "group out"],
    factor: Float[Array, "group group"],
    scale: Float[Array, " out"],
    zero: Float[Array, " out"],
    threshold: Float[Array, " out"] | None,
    config: SpqrConfig,
) -> tuple[Array, tuple[Array, Array] | None, Array]:
    """Codes, outliers with residuals, and errors e = (w − ŵ) / U_jj of a group's columns, one after the other."""

    def step(group: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple]:
        index, factor_row = inputs
        column = jax.lax.dynamic_index_in_dim(group, index, keepdims=False)
        code = encode(column, scale, zero, config.bits)
        error = (column - decode(code, scale, zero)) / factor_row[index]
        outliers = None
        if threshold is not None:
            is_outlier = jnp.square(error) > threshold
            code = jnp.where(is_outlier, encode(jnp.zeros_like(column), scale, zero, config.bits), code)
            outliers = is_outlier, column - decode(code, scale, zero)
            error = jnp.where(is_outlier, 0, error)
        later = jnp.arange(config.group_size) > index
        group = group - jnp.where(later, factor_row, 0)[:, None] * error
        return group, (code.astype(jnp.uint8), outliers, error)

    _, results = jax.lax.scan(step, group, (jnp.arange(config.group_size), factor))
    return results


def _rows(solution: Solution, start: int, stop: int) -> Solution:
    """The part of a solution that belongs to output rows `start` to `stop` (whole statistics groups)."""
    out = solution.codes.shape[0]
    return jax.tree.map(lambda a: a[start * len(a) // out : stop * len(a) // out], solution)


def _dense(solution: Solution, factor: Factor, config: SpqrConfig) -> Float[Array, "out in"]:
    """The weight that a solution stands for, columns in the order of the input features."""
    scale, zero = (jnp.repeat(_values(s), config.group_size, axis=1) for s in (solution.scale, solution.zero))
    weight = decode(solution.codes, scale, zero)
    if solution.outliers is not None:
        is_outlier, residual = solution.outliers
        weight += jnp.where(is_outlier, rounded(residual, jnp.float16), 0)
    return weight if factor.permutation is None else weight.T[jnp.argsort(factor.permutation)].T


def _values(statistics: Statistics) -> Float[Array, "out groups"]:
    if not isinstance(statistics, QuantizedStatistics):
        return statistics
    rows = len(statistics.codes) // len(statistics.scale)
    scale, zero = (jnp.repeat(s, rows, axis=0) for s in (statistics.scale, statistics.zero))
    return decode(statistics.codes, scale, zero)


def _pack(solution: Solution, factor: Factor, config: SpqrConfig) -> SpqrTensor:
    return pack(
        solution.codes,
        solution.scale,
        solution.zero,
        bits=config.bits,
        group_size=config.group_size,
        scale_bits=config.scale_bits,
        zero_bits=config.zero_bits,
        outliers=solution.outliers,
        permutation=factor.permutation,
        stats_dtype=config.stats_dtype,
    )
