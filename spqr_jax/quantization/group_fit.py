"""Min–max fits of scales and zeros, and their second-level quantization.

Arrays here hold a group's weights along the first axis and output rows along the last.
"""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels import QuantizedStatistics

Rows = Float[Array, "*batch out"]

RANGE_CUTS = (0.0, 0.1, 0.2)
"""Parts of a range that a fit by error may leave out at either end."""

# The largest zero a fit may give, in steps: it must not overflow in float16.
MAX_ZERO = 2.0**15


def min_max_fit(low: Rows, high: Rows, bits: int) -> tuple[Rows, Rows]:
    """Scale and zero that map `low` to code 0 and `high` to code 2^bits − 1.

    scale = (high − low) / (2^bits − 1), zero = −low / scale. A range too narrow for its distance from 0 (a single
    value, say) is widened to reach 0, which its end then represents exactly; a range that is only 0 has scale 0.
    """
    max_code = 2**bits - 1
    narrow = (high - low) * MAX_ZERO <= max_code * jnp.maximum(jnp.abs(low), jnp.abs(high))
    low = jnp.where(narrow, jnp.minimum(low, 0), low)
    high = jnp.where(narrow, jnp.maximum(high, 0), high)
    scale = (high - low) / max_code
    return scale, -low / _divisor(scale)


def least_error_fit(
    group: Float[Array, "group out"],
    low: Rows,
    high: Rows,
    costs: Float[Array, "group out"],
    largest_cost: Float[Array, " out"],
    bits: int,
) -> tuple[Rows, Rows]:
    """The min–max fit of that part of a range with the least Σ_j min(costs_j (w_j − ŵ_j)², largest_cost).

    Parts leave out 0, 10 or 20 % at either end; weights there are clipped, for finer steps between the others.
    """

    def fit(cuts: Float[Array, "2"]) -> tuple[Rows, Rows, Rows]:
        width = high - low
        scale, zero = min_max_fit(low + cuts[0] * width, high - cuts[1] * width, bits)
        errors = costs * jnp.square(group - decode(encode(group, scale, zero, bits), scale, zero))
        return jnp.minimum(errors, largest_cost).sum(axis=0), scale, zero

    def better(best: tuple[Rows, Rows, Rows], cuts: Float[Array, "2"]) -> tuple[tuple[Rows, Rows, Rows], None]:
        found = fit(cuts)
        less = found[0] < best[0]
        return jax.tree.map(lambda new, old: jnp.where(less, new, old), found, best), None

    first, *others = itertools.product(RANGE_CUTS, repeat=2)
    (_, scale, zero), _ = jax.lax.scan(better, fit(jnp.array(first)), jnp.array(others))
    return scale, zero


def encode(values: Array, scale: Array, zero: Array, bits: int) -> Array:
    """Codes clip(round(value / scale + zero), 0, 2^bits − 1), in the values' type."""
    return jnp.clip(jnp.round(values / _divisor(scale) + zero), 0, 2**bits - 1)


def decode(codes: Array, scale: Array, zero: Array) -> Array:
    """scale · (code − zero)."""
    return scale * (codes - zero)


def quantize_statistics(
    values: Float[Array, " out"], bits: int, stats_group_size: int, dtype: DTypeLike
) -> tuple[QuantizedStatistics, Float[Array, " out"]]:
    """Quantizes the scales (or zeros) of one group column, `stats_group_size` rows together.

    The second-level scale and zero are rounded to `dtype` before they are used, so that what the solver sees is what
    is stored. Returns codes with second-level statistics (one per statistics group), and the values that they stand
    for.
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
    """How much a group's Σ_j weights_j (w_j − ŵ_j)² falls when one weight is left out of the fit and kept exact.

    Only the minimum and the maximum change a fit by leaving, so three fits serve all weights: for every other weight
    the gain is its own squared error.
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
    """The values that are left when these are stored in another type, in their own type."""
    # Otherwise XLA takes out the two conversions on a GPU, and with them the rounding.
    return jax.lax.optimization_barrier(values.astype(dtype)).astype(values.dtype)


def _divisor(scale: Array) -> Array:
    return jnp.where(scale == 0, 1, scale)
