import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.hessian import REFIT_DAMPING, complete, drift, input_moments, refit, relative_error

IN = 40

SHRINKAGE = 0.2


@pytest.fixture(scope="module")
def inputs():
    """What a quantized model feeds a matrix, and what the original does: correlated, and not quite the same."""
    rng = np.random.default_rng(0)
    original = rng.standard_normal((3, 50, IN)) @ rng.standard_normal((IN, IN))
    quantized = original + 2 * rng.standard_normal(original.shape)
    return quantized.astype(np.float32), original.astype(np.float32)


@pytest.fixture(scope="module")
def moments(inputs):
    return complete(jax.jit(input_moments)(*inputs))


@pytest.fixture(scope="module")
def weight():
    return np.random.default_rng(1).standard_normal((24, IN), np.float32)


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, IN).astype(np.float64)


def test_moments(inputs, moments):
    x, original = map(flat, inputs)
    np.testing.assert_allclose(moments.hessian, x.T @ x, rtol=1e-5, atol=1e-5 * (x**2).sum(axis=0).max())
    np.testing.assert_allclose(moments.cross, original.T @ x, rtol=1e-5, atol=1e-5 * (x**2).sum(axis=0).max())
    np.testing.assert_array_equal(moments.hessian, moments.hessian.T)


def test_moments_of_low_precision_inputs_are_summed_in_float32(inputs):
    x = jnp.array(inputs[0], jnp.bfloat16)
    moments = complete(input_moments(x, None))
    assert moments.cross is None
    assert moments.hessian.dtype == jnp.float32
    exact = flat(np.asarray(x)).T @ flat(np.asarray(x))
    np.testing.assert_allclose(moments.hessian, exact, rtol=1e-5, atol=1e-5 * np.diag(exact).max())


def test_moments_add_up_over_batches(inputs, moments):
    parts = [input_moments(x[None], original[None]) for x, original in zip(*inputs, strict=True)]
    total = complete(jax.tree.map(lambda *m: sum(m), *parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), total, moments)


def ridge(x: np.ndarray) -> np.ndarray:
    """The diagonal of Λ."""
    diagonal = (x**2).sum(axis=0)
    return REFIT_DAMPING * diagonal.mean() + SHRINKAGE * diagonal


def refit_loss(new: np.ndarray, weight: np.ndarray, x: np.ndarray, original: np.ndarray) -> float:
    return ((original @ weight.T - x @ new.T) ** 2).sum() + (ridge(x) * (new - weight) ** 2).sum()


def test_refit_minimizes_its_loss(inputs, moments, weight):
    x, original = map(flat, inputs)
    (new,) = jax.jit(lambda weights, moments: refit(weights, drift(*moments, SHRINKAGE)))((weight,), moments)
    held = np.diag(ridge(x))
    # The normal equations W' (H + Λ) = W (C + Λ).
    solution = np.linalg.solve(x.T @ x + held, (weight @ (original.T @ x + held)).T).T
    np.testing.assert_allclose(new, solution, rtol=1e-3, atol=1e-3)
    best = refit_loss(np.asarray(new, np.float64), weight, x, original)
    assert best < 0.99 * refit_loss(weight, weight, x, original)
    for seed in range(3):
        moved = new + 0.01 * np.random.default_rng(seed).standard_normal(new.shape)
        assert best < refit_loss(moved, weight, x, original)


def test_refit_of_several_matrices_is_that_of_each(moments, weight):
    change = drift(*moments, SHRINKAGE)
    together = refit((weight, 2 * weight[:8]), change)
    for new, alone in zip(together, (weight, 2 * weight[:8]), strict=True):
        np.testing.assert_allclose(new, refit((alone,), change)[0], rtol=1e-5, atol=1e-5)


def test_refit_leaves_weights_where_there_is_nothing_to_refit(moments, weight):
    np.testing.assert_array_equal(refit((weight,), drift(moments.hessian, moments.hessian, SHRINKAGE))[0], weight)


def test_relative_error(inputs, moments, weight):
    x = flat(inputs[0])
    approximation = weight + 0.1 * np.random.default_rng(2).standard_normal(weight.shape, np.float32)
    expected = ((x @ (weight - approximation).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert relative_error(weight, approximation, moments.hessian) == pytest.approx(expected, rel=1e-4)
