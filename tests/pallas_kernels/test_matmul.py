import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_packed import packed_of_three_bits

from pallas_kernels import spqr_dequantize, spqr_matmul

OUT, COLUMNS = 48, 80
MATMUL = jax.jit(spqr_matmul)


def matrix(outlier_share: float | None, permuted: bool):
    order: Literal["random"] | None = "random" if permuted else None
    return packed_of_three_bits(np.random.default_rng(0), OUT, COLUMNS, share=outlier_share, permutation=order)


@pytest.fixture(scope="module")
def packed():
    return matrix(0.05, permuted=True)


def random_x(*batch: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jnp.array(np.random.default_rng(1).standard_normal((*batch, COLUMNS)), dtype)


def assert_product(y, x, packed):
    """y is x ŵᵀ up to the rounding of the weight and of the result to y's type, and a sum in float32."""
    x64, weight = np.asarray(x, np.float64), np.asarray(spqr_dequantize(packed), np.float64)
    exact = x64 @ weight.T
    unit = float(jnp.finfo(y.dtype).eps) / 2
    summed = np.abs(x64) @ np.abs(weight).T
    bound = unit * (summed + np.abs(exact)) + 1e-6 * summed
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], OUT)
    assert (np.abs(np.asarray(y, np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_product(packed, batch, dtype):
    x = random_x(*batch, dtype=dtype)
    assert_product(MATMUL(x, packed), x, packed)


@pytest.mark.parametrize(("share", "permuted"), [(None, False), (0.0, True), (1.0, False)])
def test_product_with_and_without_outliers_and_permutation(share, permuted):
    packed = matrix(share, permuted)
    assert_product(MATMUL(random_x(4), packed), random_x(4), packed)


def test_padded_outliers_change_nothing(packed):
    padded = dataclasses.replace(
        packed,
        outliers=packed.outliers.pad(packed.outliers.capacity + 9),
    )
    np.testing.assert_array_equal(MATMUL(random_x(4), padded), MATMUL(random_x(4), packed))


def test_eager_is_the_same_as_jitted(packed):
    x = random_x(4)
    np.testing.assert_allclose(spqr_matmul(x, packed), MATMUL(x, packed), rtol=1e-5, atol=1e-5)


def test_vmap_over_inputs(packed):
    x = random_x(3, 4)
    np.testing.assert_allclose(
        jax.vmap(spqr_matmul, in_axes=(0, None))(x, packed), MATMUL(x, packed), rtol=1e-5, atol=1e-5
    )


def test_gradient_with_respect_to_inputs(packed):
    x, y = random_x(4), np.random.default_rng(2).standard_normal((4, OUT), np.float32)
    gradient = jax.grad(lambda x: jnp.vdot(y, spqr_matmul(x, packed)))(x)
    np.testing.assert_allclose(gradient, y @ np.asarray(spqr_dequantize(packed)), rtol=1e-5, atol=1e-5)


def test_wrong_number_of_features(packed):
    with pytest.raises(ValueError, match=r"x has 64 features, but the weight of shape \(48, 80\) takes 80"):
        spqr_matmul(jnp.zeros((2, 64)), packed)
