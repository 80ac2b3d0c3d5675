import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.quantization.moments import InputMoments
from spqr_jax.quantization.refit import REFIT_DAMPING, Drift, refit, ridge_inverse

SHRINKAGE = 0.2


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).astype(np.float64)


def without_residual(moments: InputMoments) -> InputMoments:
    return moments._replace(drift=Drift(moments.drift.cross, None))


def ridge(x: np.ndarray) -> np.ndarray:
    """The diagonal of Λ."""
    diagonal = (x**2).sum(axis=0)
    return REFIT_DAMPING * diagonal.mean() + SHRINKAGE * diagonal


@jax.jit
def refitted(weights: tuple[np.ndarray, ...], moments: InputMoments) -> tuple[jax.Array, ...]:
    rows = weights, None if moments.drift.residual is None else moments.drift.residual.T
    return refit(rows, moments.drift.cross - moments.hessian, ridge_inverse(moments.hessian, SHRINKAGE))


def refit_loss(new: np.ndarray, weight: np.ndarray, x: np.ndarray, target: np.ndarray) -> float:
    return ((target - x @ new.T) ** 2).sum() + (ridge(x) * (new - weight) ** 2).sum()


@pytest.mark.parametrize("restores", [False, True])
def test_refit_minimizes_its_loss(inputs, moments, weight, restores):
    x, original, residual = map(flat, inputs)
    target = original @ weight.T + restores * residual
    (new,) = refitted((weight,), moments if restores else without_residual(moments))
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
    moments = without_residual(moments)
    together = refitted((weight, 2 * weight[:8]), moments)
    for new, alone in zip(together, (weight, 2 * weight[:8]), strict=True):
        np.testing.assert_allclose(new, refitted((alone,), moments)[0], rtol=1e-5, atol=1e-5)


def test_refit_leaves_weights_where_there_is_nothing_to_refit(moments, weight):
    nothing = moments._replace(drift=Drift(moments.hessian, jnp.zeros_like(moments.drift.residual)))
    np.testing.assert_array_equal(refitted((weight,), nothing)[0], weight)


def test_refit_leaves_weights_whose_inputs_are_all_zero(moments, weight):
    """As behind a block of zeros: H + Λ would be singular."""
    nothing = jax.tree.map(jnp.zeros_like, moments)
    np.testing.assert_array_equal(refitted((weight,), nothing)[0], weight)
