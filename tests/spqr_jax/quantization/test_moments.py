import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.chance import reference_chance

from spqr_jax.quantization.moments import (
    REFIT_DAMPING,
    InputMoments,
    complete,
    moment_sums,
    refit,
    relative_error,
    ridge_inverse,
)

IN = 40
OUT = 24

SHRINKAGE = 0.2


@pytest.fixture(scope="module")
def inputs():
    """What a quantized model feeds a matrix, and what the original does: correlated, and not quite the same; and what
    the hidden states have lost."""
    rng = np.random.default_rng(0)
    original = rng.standard_normal((3, 50, IN)) @ rng.standard_normal((IN, IN))
    quantized = original + 2 * rng.standard_normal(original.shape)
    lost = quantized @ rng.standard_normal((IN, OUT)) / 10 + rng.standard_normal((3, 50, OUT))
    return tuple(x.astype(np.float32) for x in (quantized, original, lost))


@pytest.fixture(scope="module")
def moments(inputs):
    return complete(jax.jit(moment_sums)(*inputs), len(inputs[0]))


@pytest.fixture(scope="module")
def weight():
    return np.random.default_rng(1).standard_normal((OUT, IN), np.float32)


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).astype(np.float64)


def test_moments(inputs, moments):
    x, original, lost = map(flat, inputs)
    largest = (x**2).sum(axis=0).max()
    np.testing.assert_allclose(moments.hessian, x.T @ x, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(moments.cross, original.T @ x, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(moments.lost, x.T @ lost, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_array_equal(moments.hessian, moments.hessian.T)


def test_moments_of_low_precision_inputs_are_summed_in_float32(inputs):
    x = jnp.array(inputs[0], jnp.bfloat16)
    moments = complete(moment_sums(x), len(x))
    assert moments.cross is None
    assert moments.lost is None
    assert moments.hessian.dtype == jnp.float32
    exact = flat(np.asarray(x)).T @ flat(np.asarray(x))
    np.testing.assert_allclose(moments.hessian, exact, rtol=1e-5, atol=1e-5 * np.diag(exact).max())


def test_moments_add_up_over_batches(inputs, moments):
    parts = [moment_sums(*(x[None] for x in sequence)) for sequence in zip(*inputs, strict=True)]
    total = complete(jax.tree.map(lambda *m: sum(m), *parts), len(parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), total, moments)


def test_chance_is_what_the_differences_of_sequences_show(inputs, moments):
    assert 0.01 < moments.chance < 0.9
    assert moments.chance == pytest.approx(reference_chance(inputs[0]), rel=2**-8)


def random_sequences(sequences: int, tokens: int, mix: np.ndarray, seed: int) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal((sequences, tokens, IN)) @ mix
    return jnp.asarray(x, jnp.float32)


def test_chance_is_all_there_is_between_independent_features():
    sums = [moment_sums(random_sequences(32, 100, np.eye(IN), seed)) for seed in range(4)]
    assert np.mean([complete(s, 32).chance for s in sums]) == pytest.approx(1, abs=0.05)


def test_shrinking_by_chance_brings_correlations_nearest_to_the_true_ones():
    """On average over texts, no other factor of the correlations off the diagonal has a smaller error."""
    mix = np.linalg.cholesky(0.1 + 0.9 * np.eye(IN)).T
    factors = np.linspace(0, 1, 101)
    errors, chances = np.zeros(len(factors)), []
    for seed in range(20):
        moments = complete(moment_sums(random_sequences(8, 64, mix, seed)), 8)
        norms = np.sqrt(np.diag(moments.hessian))
        found = (moments.hessian / np.outer(norms, norms))[~np.eye(IN, dtype=bool)]
        errors += [((factor * found - 0.1) ** 2).sum() for factor in factors]
        chances.append(float(moments.chance))
    assert 1 - factors[errors.argmin()] == pytest.approx(np.mean(chances), abs=0.03)


def test_one_sequence_and_features_that_never_occur_say_nothing_of_chance(inputs):
    x = inputs[0]
    assert complete(moment_sums(x[:1]), 1).chance == 0
    alive = np.arange(IN) < IN // 2
    assert complete(moment_sums(x * alive), 3).chance == pytest.approx(reference_chance(x[..., alive]), rel=2**-8)
    assert complete(moment_sums(jnp.zeros_like(x)), 3).chance == 0


def ridge(x: np.ndarray) -> np.ndarray:
    """The diagonal of Λ."""
    diagonal = (x**2).sum(axis=0)
    return REFIT_DAMPING * diagonal.mean() + SHRINKAGE * diagonal


@jax.jit
def refitted(weights: tuple[np.ndarray, ...], moments: InputMoments) -> tuple[jax.Array, ...]:
    rows = weights, None if moments.lost is None else moments.lost.T
    return refit(rows, moments.cross - moments.hessian, ridge_inverse(moments.hessian, SHRINKAGE))


def refit_loss(new: np.ndarray, weight: np.ndarray, x: np.ndarray, target: np.ndarray) -> float:
    return ((target - x @ new.T) ** 2).sum() + (ridge(x) * (new - weight) ** 2).sum()


@pytest.mark.parametrize("restores", [False, True])
def test_refit_minimizes_its_loss(inputs, moments, weight, restores):
    x, original, lost = map(flat, inputs)
    target = original @ weight.T + restores * lost
    (new,) = refitted((weight,), moments if restores else moments._replace(lost=None))
    held = np.diag(ridge(x))
    # The normal equations W' (H + Λ) = Σ target xᵀ + W Λ.
    solution = np.linalg.solve(x.T @ x + held, x.T @ target + held @ weight.T).T
    np.testing.assert_allclose(new, solution, rtol=1e-3, atol=1e-3)
    best = refit_loss(np.asarray(new, np.float64), weight, x, target)
    assert best < 0.99 * refit_loss(weight, weight, x, target)
    for seed in range(3):
        moved = new + 0.01 * np.random.default_rng(seed).standard_normal(new.shape)
        assert best < refit_loss(moved, weight, x, target)


def test_refit_of_several_matrices_is_that_of_each(moments, weight):
    moments = moments._replace(lost=None)
    together = refitted((weight, 2 * weight[:8]), moments)
    for new, alone in zip(together, (weight, 2 * weight[:8]), strict=True):
        np.testing.assert_allclose(new, refitted((alone,), moments)[0], rtol=1e-5, atol=1e-5)


def test_refit_leaves_weights_where_there_is_nothing_to_refit(moments, weight):
    nothing = moments._replace(cross=moments.hessian, lost=jnp.zeros_like(moments.lost))
    np.testing.assert_array_equal(refitted((weight,), nothing)[0], weight)


def test_relative_error(inputs, moments, weight):
    x = flat(inputs[0])
    approximation = weight + 0.1 * np.random.default_rng(2).standard_normal(weight.shape, np.float32)
    expected = ((x @ (weight - approximation).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert relative_error(weight, approximation, moments.hessian) == pytest.approx(expected, rel=1e-4)
