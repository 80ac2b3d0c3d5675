import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pack, spqr_dequantize, spqr_matmul, trim

OUT, COLUMNS = 48, 80
MATMUL = jax.jit(spqr_matmul)


def random_packed(outlier_share: float | None, permuted: bool):
    rng = np.random.default_rng(0)
    shape = OUT, COLUMNS
    outliers = rng.random(shape) < (outlier_share or 0), rng.standard_normal(shape, np.float32)
    packed = pack(
        rng.integers(0, 8, shape, np.uint8),
        rng.uniform(0.05, 0.1, (OUT, COLUMNS // 16)).astype(np.float32),
        rng.uniform(2, 5, (OUT, COLUMNS // 16)).astype(np.float32),
        bits=3,
        group_size=16,
        outliers=None if outlier_share is None else outliers,
        permutation=rng.permutation(COLUMNS) if permuted else None,
    )
    return trim(packed)


@pytest.fixture(scope="module")
def packed():
    return random_packed(0.05, permuted=True)


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
    packed = random_packed(share, permuted)
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
