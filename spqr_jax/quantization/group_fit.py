"""Fits of a group's scale and zero, and the second-level quantization of these statistics.

Arrays here hold a group's weights along the first axis and output rows along the last.
"""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels import QuantizedStatistics
from spqr_jax.config import SpqrConfig

Values = Float[Array, "*shape"]
"""One value per group."""

CostAndFit = tuple[Values, Values, Values]

ColumnStatistics = Float[Array, " out"] | QuantizedStatistics
"""The stored scales (or zeros) of one group column."""

RANGE_CUTS = (0.0, 0.1, 0.2)
"""Shares of a range that a fit by error may leave out at either end."""

MAX_ZERO = 2.0**15
"""The largest zero of a fit, in steps: half of float16's range."""


def fit_group(
    group: Float[Array, "group out"],
    diagonal: Float[Array, " group"],
    threshold: Float[Array, " out"] | None,
    config: SpqrConfig,
) -> tuple[Float[Array, " out"], Float[Array, " out"], tuple[ColumnStatistics, ColumnStatistics]]:
    """Scale and zero of a group in each row, as they will be stored; likely outliers are left out of the fit."""
    low, high = group.min(axis=0), group.max(axis=0)
    costs = jnp.broadcast_to(1 / jnp.square(diagonal)[:, None], group.shape)
    if threshold is not None and not config.simplified:
        gain = leave_one_out_gain(group, costs[:, 0], config.bits)
        # A row that is kept whole is fitted like the others, because their statistics are quantized together.
        likely = (gain > threshold) & (threshold >= 0)
        kept_low = jnp.where(likely, jnp.inf, group).min(axis=0)
        kept_high = jnp.where(likely, -jnp.inf, group).max(axis=0)
        # Fewer than two values are left to fit: the range that the official code takes.
        unfit = (kept_low >= kept_high) & (low < high)
        low, high = jnp.where(unfit, -1, kept_low), jnp.where(unfit, 1, kept_high)
        costs = jnp.where(likely, 0, costs)
    if config.fit == "error":
        # A weight with a cost above T becomes an outlier, and costs no more.
        most = jnp.full_like(low, jnp.inf) if threshold is None else jnp.where(threshold < 0, jnp.inf, threshold)
        scale, zero = least_error_fit(group, low, high, costs, most, config.bits)
    else:
        scale, zero = min_max_fit(low, high, config.bits)

    def store(values: Array, bits: int | None) -> tuple[ColumnStatistics, Array]:
        if bits is not None:
            return quantize_statistics(values, bits, config.stats_group_size, config.stats_dtype)
        stored = rounded(values, config.stats_dtype)
        return stored, stored

    stored_scale, scale = store(scale, config.scale_bits)
    stored_zero, zero = store(zero, config.zero_bits)
    return scale, zero, (stored_scale, stored_zero)


def min_max_fit(low: Values, high: Values, bits: int) -> tuple[Values, Values]:
    """Scale and zero that map `low` to code 0 and `high` to code 2^bits − 1.

    scale = (high − low) / (2^bits − 1), zero = −low / scale. A range too narrow for its distance from 0, such as a
    single value, is widened to reach 0. Its other end is then represented exactly. A range that is only 0 has scale 0.
    """
    max_code = 2**bits - 1
    narrow = (high - low) * MAX_ZERO <= max_code * jnp.maximum(jnp.abs(low), jnp.abs(high))
    low = jnp.where(narrow, jnp.minimum(low, 0), low)
    high = jnp.where(narrow, jnp.maximum(high, 0), high)
    scale = (high - low) / max_code
    return scale, -low / _divisor(scale)


def least_error_fit(
    group: Float[Array, "group out"],
    low: Values,
    high: Values,
    costs: Float[Array, "group out"],
    largest_cost: Float[Array, " out"],
    bits: int,
) -> tuple[Values, Values]:
    """The min–max fit of the part of a range with the least Σ_j min(costs_j (w_j − ŵ_j)², largest_cost).

    Parts leave out 0, 10 or 20 % at either end. Weights there are clipped, which makes the steps between others finer.
    """

    def fit(cuts: Float[Array, "2"]) -> CostAndFit:
        width = high - low
        scale, zero = min_max_fit(low + cuts[0] * width, high - cuts[1] * width, bits)
        errors = costs * jnp.square(group - decode(encode(group, scale, zero, bits), scale, zero))
        return jnp.minimum(errors, largest_cost).sum(axis=0), scale, zero

    def better(
        best: tuple[Values, Values, Values], cuts: Float[Array, "2"]
    ) -> tuple[tuple[Values, Values, Values], None]:
        found = fit(cuts)
        less = found[0] < best[0]
        return jax.tree.map(lambda new, old: jnp.where(less, new, old), found, best), None

    first, *others = itertools.product(RANGE_CUTS, repeat=2)
    (_, scale, zero), _ = jax.lax.scan(better, fit(jnp.array(first)), jnp.array(others))
    return scale, zero


def encode(values: Array, scale: Array, zero: Array, bits: int) -> Array:
    """The codes clip(round(value / scale + zero), 0, 2^bits − 1), in the type of the values."""
    return jnp.clip(jnp.round(values / _divisor(scale) + zero), 0, 2**bits - 1)


def decode(codes: Array, scale: Array, zero: Array) -> Array:
    """scale · (code − zero)."""
    return scale * (codes - zero)


def quantize_statistics(
    values: Float[Array, " out"], bits: int, stats_group_size: int, dtype: DTypeLike
) -> tuple[QuantizedStatistics, Float[Array, " out"]]:
    """Quantizes the scales (or zeros) of one group column, `stats_group_size` rows together.

    The second-level scale and zero are rounded to `dtype` before they are used, so that the solver sees the stored
    values.

    Returns:
      Codes with second-level statistics, one pair per statistics group.
      The dequantized scales (or zeros).
    """
    grouped = values.reshape(-1, stats_group_size)
    low, high = grouped.min(axis=1), grouped.max(axis=1)
    scale, zero = (rounded(s, dtype)[:, None] for s in min_max_fit(low, high, bits))
    codes = encode(grouped, scale, zero, bits)
    quantized = QuantizedStatistics(codes.reshape(-1).astype(jnp.uint8), scale[:, 0], zero[:, 0])
    return quantized, decode(codes, scale, zero).reshape(values.shape)


def leave_one_out_gain(
    group: Float[Array, "group out"], weights: Float[Array, " group"], bits: int
) -> Float[Array, "group out"]:
    """The fall of a group's Σ_j weights_j (w_j − ŵ_j)² when one weight is left out of the fit and kept exactly.

    Only leaving out the minimum or the maximum changes the fit, so three fits serve all weights. For every other weight
    the gain is its own error term.
    """
    index = jnp.arange(len(group))[:, None]
    lowest, highest = index == jnp.argmin(group, axis=0), index == jnp.argmax(group, axis=0)
    kept = ~jnp.stack([jnp.zeros_like(lowest), lowest, highest])
    low = jnp.where(kept, group, jnp.inf).min(axis=1, keepdims=True)
    high = jnp.where(kept, group, -jnp.inf).max(axis=1, keepdims=True)
    scale, zero = min_max_fit(low, high, bits)
    errors = jnp.square(group - decode(encode(group, scale, zero, bits), scale, zero)) * weights[:, None]
    total, without_lowest, without_highest = jnp.where(kept, errors, 0).sum(axis=1)
    return jnp.where(lowest, total - without_lowest, jnp.where(highest, total - without_highest, errors[0]))


def rounded(values: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """The values rounded to another type, returned in their own type."""
    # Without the barrier, XLA removes both conversions on a GPU, and with them the rounding.
    return jax.lax.optimization_barrier(values.astype(dtype)).astype(values.dtype)


def _divisor(scale: Array) -> Array:
    return jnp.where(scale == 0, 1, scale)
