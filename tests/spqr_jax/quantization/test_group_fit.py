import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spqr_jax.quantization.group_fit import (
    MAX_ZERO,
    decode,
    encode,
    least_error_fit,
    leave_one_out_gain,
    min_max_fit,
    quantize_statistics,
)

BITS = 3
# XLA takes subnormal numbers for 0, among them the step of a range smaller than this.
SUBNORMAL_RANGE = (2**BITS - 1) * float(np.finfo(np.float32).tiny)
FIT = jax.jit(min_max_fit, static_argnames="bits")
GAIN = jax.jit(leave_one_out_gain, static_argnames="bits")
LEAST_ERROR_FIT = jax.jit(least_error_fit, static_argnames="bits")


@jax.jit
def fit_and_decode(values):
    scale, zero = min_max_fit(values.min(), values.max(), BITS)
    codes = encode(values, scale, zero, BITS)
    return scale, zero, codes, decode(codes, scale, zero)


@jax.jit
def second_level(values):
    return quantize_statistics(values, BITS, 16, jnp.float16)


def floats(limit: float, size: int) -> st.SearchStrategy[list[float]]:
    """Finite float32 numbers of any size up to a limit, often the same or nearly the same one."""
    number = st.floats(-limit, limit, width=32, allow_subnormal=False)
    near = st.builds(lambda a, b: [a * (1 + 1e-7 * c) for c in b], number, st.lists(st.integers(0, 9), min_size=size))
    same = st.builds(lambda a: [a] * size, number)
    return (st.lists(number, min_size=size, max_size=size) | same | near).map(lambda v: v[:size])


def as_float32(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@given(floats(2.0**100, 8))
@example([0.0] * 8)
@example([-0.0, 0.0] * 4)
@example([1.0] * 7 + [float(np.nextafter(np.float32(1), np.float32(2)))])
@example([-5.0] * 8)
def test_min_max_fit(values):
    values = as_float32(values)
    scale, zero, codes, decoded = (np.asarray(a, np.float64) for a in fit_and_decode(values))
    assert np.isfinite([scale, zero, *decoded]).all()
    assert scale >= 0
    assert abs(zero) <= MAX_ZERO * 1.001
    assert ((codes >= 0) & (codes < 2**BITS)).all()
    # Half a step, and float32's rounding of a zero of that many steps.
    rounding = 1e-6 * scale * (1 + abs(zero)) + SUBNORMAL_RANGE
    assert (np.abs(decoded - values) <= scale / 2 + rounding).all()


@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
def test_a_single_value_is_exact(value):
    decoded = np.asarray(fit_and_decode(np.full(8, value, np.float32))[-1])
    np.testing.assert_allclose(decoded, np.float32(value), rtol=3e-7, atol=SUBNORMAL_RANGE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_ends_of_a_range_get_the_first_and_the_last_code(bits):
    low, high = jnp.array([-1.0, 0.5, -3.0]), jnp.array([2.0, 0.75, -1.0])
    scale, zero = FIT(low, high, bits)
    np.testing.assert_allclose(scale, (high - low) / (2**bits - 1), rtol=1e-6)
    np.testing.assert_array_equal(encode(low, scale, zero, bits), 0)
    np.testing.assert_array_equal(encode(high, scale, zero, bits), 2**bits - 1)


def test_encode_clips_and_rounds():
    values = jnp.array([-9.0, -0.6, 0.6, 3.4, 9.0])
    np.testing.assert_array_equal(encode(values, jnp.float32(1), jnp.float32(2.0), 3), [0, 1, 3, 5, 7])


@given(floats(30000.0, 32))
@example([0.0] * 32)
@example([1.0] * 31 + [float(np.nextafter(np.float32(1), np.float32(2)))])
@example([30000.0] * 31 + [-30000.0])
@example([1e-7] * 16 + [2e-7] * 16)
def test_second_level_statistics_in_float16(values):
    values = as_float32(values)
    quantized, decoded = second_level(values)
    decoded = np.asarray(decoded, np.float64)
    for name in ("scale", "zero"):
        stored = np.asarray(getattr(quantized, name))
        assert np.isfinite(stored).all()
        np.testing.assert_array_equal(stored, stored.astype(np.float16))
    scale, zero = (np.repeat(np.asarray(s, np.float64), 16) for s in (quantized.scale, quantized.zero))
    np.testing.assert_allclose(scale * (np.asarray(quantized.codes) - zero), decoded, rtol=1e-6, atol=1e-37)
    # Half a step, the 11 bits of both numbers, and the smallest step of float16 for each code.
    largest = np.abs(values).reshape(2, 16).max(axis=1).repeat(16)
    assert (np.abs(decoded - values) <= scale / 2 + 2**-9 * largest + 2**BITS * 2.0**-24).all()


def brute_force_gain(group: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As many fits as there are weights, for one row."""

    def loss(fitted: np.ndarray, of: np.ndarray) -> float:
        low, high = group[fitted].min(), group[fitted].max()
        if low == high:
            assert (group[of] == low).all()
            return 0.0
        scale = (high - low) / (2**BITS - 1)
        codes = np.clip(np.round((group[of] - low) / scale), 0, 2**BITS - 1)
        return float((weights[of] * (group[of] - scale * codes - low) ** 2).sum())

    everyone = np.arange(len(group))
    total = loss(everyone, everyone)
    return np.array([total - loss(others, others) for k in everyone for others in [np.delete(everyone, k)]])


group_values = st.lists(st.integers(-4, 4).map(float), min_size=8, max_size=8) | st.lists(
    st.floats(-4, 4).map(lambda v: round(v, 3)), min_size=8, max_size=8
)


@given(group_values, st.integers(0, 2**32 - 1))
@example([1.0] * 8, 0)
@example([1.0] * 7 + [2.0], 0)
def test_leave_one_out_gain_is_that_of_as_many_fits_as_weights(values, seed):
    group = np.array(values)
    weights = np.random.default_rng(seed).uniform(0.5, 2, 8)
    gain = GAIN(group[:, None].astype(np.float32), weights.astype(np.float32), bits=BITS)
    np.testing.assert_allclose(gain[:, 0], brute_force_gain(group, weights), rtol=1e-4, atol=1e-5)


@given(group_values, st.integers(0, 2**32 - 1))
@example([1.0] * 8, 0)
@example([0.0] * 7 + [2.0], 0)
@example([-0.5, -0.75, 0.0, 0.0, 1.125, 1.125, 0.844, -0.5], 0)
def test_a_fit_by_error_is_no_worse_than_that_of_the_whole_range(values, seed):
    group = jnp.asarray(as_float32(values)[:, None])
    costs = np.random.default_rng(seed).uniform(0, 2, group.shape).astype(np.float32)
    low, high = group.min(axis=0), group.max(axis=0)
    most = np.full(1, np.inf if seed % 2 else (high - low)[0] ** 2 / 100, np.float32)

    def loss(scale, zero):
        errors = costs * (group - decode(encode(group, scale, zero, BITS), scale, zero)) ** 2
        return float(np.minimum(errors, most).sum())

    fitted, whole = LEAST_ERROR_FIT(group, low, high, costs, most, bits=BITS), min_max_fit(low, high, BITS)
    # Decoded values are rounded, each by some units in the last place of the largest.
    rounding = 4 * 2.0**-23 * float(np.abs(group).max()) * float(costs.sum()) ** 0.5
    assert loss(*fitted) ** 0.5 <= loss(*whole) ** 0.5 + rounding
    assert 0.59 * float(whole[0][0]) <= float(fitted[0][0]) <= 1.0001 * float(whole[0][0])
