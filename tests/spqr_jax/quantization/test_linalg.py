"""Factors and inverses in blocks, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.factorize import factorize
from spqr_jax.quantization.linalg import upper_cholesky, upper_inverse, upper_square


def random_hessian(size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((4 * size, size)) * np.exp(0.5 * rng.standard_normal(size))
    return (x.T @ x).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 64, 257, 400, 601])
def test_blocks_give_the_factor_of_the_inverse(size):
    hessian = random_hessian(size)
    factor, _, permutation = jax.jit(factorize, static_argnums=1)(hessian, SpqrConfig())
    damped = hessian.astype(np.float64) + 0.1 * np.mean(np.diag(hessian)) * np.eye(size)
    expected = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(permutation, permutation)])).T
    assert np.linalg.norm(factor - expected) <= 5e-7 * np.linalg.norm(expected)
    np.testing.assert_array_equal(np.tril(factor, -1), 0)


def test_only_the_upper_triangle_is_read():
    hessian = random_hessian(300)
    expected = upper_cholesky(jnp.array(hessian))
    np.testing.assert_array_equal(upper_cholesky(jnp.triu(hessian)), expected)


def test_what_cannot_be_factorized_is_nan():
    hessian = random_hessian(300)
    hessian[299, 299] = -1  # the last pivot of all
    factor = upper_cholesky(jnp.array(hessian))
    assert np.isnan(factor[0, 0])
    again = upper_cholesky(upper_square(upper_inverse(factor)))
    assert np.isnan(again[0, 0])
    assert np.isnan(again[-1, -1])


def test_a_large_matrix_compiles_to_few_operations():
    for function in (upper_inverse, upper_square):
        text = jax.jit(function).lower(jax.ShapeDtypeStruct((11008, 11008), jnp.float32)).as_text()
        assert text.count("dot_general") <= 40
