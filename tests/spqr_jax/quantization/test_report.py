import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.quantization.report import relative_error


def test_relative_error(inputs, moments, weight):
    x = inputs[0].reshape(-1, inputs[0].shape[-1]).astype(np.float64)
    approximation = weight + 0.1 * np.random.default_rng(2).standard_normal(weight.shape, np.float32)
    expected = ((x @ (weight - approximation).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert relative_error(jnp.asarray(weight), jnp.asarray(approximation), moments.hessian) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize(("size", "energy"), [(0, 1), (1, 0), (0, 0)])
def test_a_matrix_or_inputs_of_zeros_have_no_error(weight, moments, size, energy):
    zeros = size * weight
    assert relative_error(jnp.asarray(zeros), jnp.asarray(zeros), energy * moments.hessian) == 0
    assert relative_error(jnp.asarray(zeros), jnp.asarray(0 * weight), 0 * moments.hessian) == 0
