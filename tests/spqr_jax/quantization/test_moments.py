import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling_noise import reference_sampling_noise

from spqr_jax.quantization.moments import complete, moment_sums

IN = 40


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).astype(np.float64)


def test_moments(inputs, moments):
    x, original, residual = map(flat, inputs)
    largest = (x**2).sum(axis=0).max()
    np.testing.assert_allclose(moments.hessian, x.T @ x, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(moments.drift.cross, original.T @ x, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(moments.drift.residual, x.T @ residual, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_array_equal(moments.hessian, moments.hessian.T)


def test_moments_of_low_precision_inputs_are_summed_in_float32(inputs):
    x = jnp.array(inputs[0], jnp.bfloat16)
    moments = complete(moment_sums(x), len(x))
    assert moments.drift is None
    assert moments.hessian.dtype == jnp.float32
    exact = flat(np.asarray(x)).T @ flat(np.asarray(x))
    np.testing.assert_allclose(moments.hessian, exact, rtol=1e-5, atol=1e-5 * np.diag(exact).max())


def test_moments_add_up_over_batches(inputs, moments):
    parts = [moment_sums(*(jnp.asarray(x[None]) for x in sequence)) for sequence in zip(*inputs, strict=True)]
    total = complete(jax.tree.map(lambda *m: sum(m), *parts), len(parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), total, moments)


def test_sampling_noise_follows_from_the_differences_of_sequences(inputs, moments):
    assert 0.01 < moments.sampling_noise < 0.9
    assert moments.sampling_noise == pytest.approx(reference_sampling_noise(inputs[0]), rel=2**-8)


def random_sequences(sequences: int, tokens: int, mix: np.ndarray, seed: int) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal((sequences, tokens, IN)) @ mix
    return jnp.asarray(x, jnp.float32)


def test_correlations_of_independent_features_are_all_sampling_noise():
    sums = [moment_sums(random_sequences(32, 100, np.eye(IN), seed)) for seed in range(4)]
    assert np.mean([complete(s, 32).sampling_noise for s in sums]) == pytest.approx(1, abs=0.05)


def test_shrinking_by_sampling_noise_brings_correlations_nearest_to_the_true_ones():
    """On average over texts, no other factor of the correlations off the diagonal has a smaller error."""
    mix = np.linalg.cholesky(0.1 + 0.9 * np.eye(IN)).T
    factors = np.linspace(0, 1, 101)
    errors, noise = np.zeros(len(factors)), []
    for seed in range(20):
        moments = complete(moment_sums(random_sequences(8, 64, mix, seed)), 8)
        norms = np.sqrt(np.diag(moments.hessian))
        found = (moments.hessian / np.outer(norms, norms))[~np.eye(IN, dtype=bool)]
        errors += [((factor * found - 0.1) ** 2).sum() for factor in factors]
        noise.append(float(moments.sampling_noise))
    assert 1 - factors[errors.argmin()] == pytest.approx(np.mean(noise), abs=0.03)


def test_one_sequence_and_dead_features_have_no_sampling_noise(inputs):
    x = jnp.asarray(inputs[0])
    assert complete(moment_sums(x[:1]), 1).sampling_noise == 0
    alive = np.arange(IN) < IN // 2
    assert complete(moment_sums(x * alive), 3).sampling_noise == pytest.approx(
        reference_sampling_noise(x[..., alive]), rel=2**-8
    )
    assert complete(moment_sums(jnp.zeros_like(x)), 3).sampling_noise == 0
