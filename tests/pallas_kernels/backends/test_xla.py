"""One row of activations, multiplied without unpacking the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_formats import small_matrix

from pallas_kernels import SpqrTensor, spqr_dequantize, spqr_matmul

PRODUCT = jax.jit(lambda x, w: spqr_matmul(x, w, implementation="xla"))


def assert_right(w: SpqrTensor) -> None:
    x = np.random.default_rng(1).standard_normal((1, w.in_features), np.float32)
    exact = x.astype(np.float64) @ np.asarray(spqr_dequantize(w), np.float64).T
    y = PRODUCT(x, w)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_array_equal(PRODUCT(x[0], w), y[0])


@pytest.mark.parametrize("bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4, 5, 8))])
@pytest.mark.parametrize("group_size", [8, 32])
def test_every_width_of_codes(bits: int, group_size: int) -> None:
    assert_right(small_matrix(0, bits=bits, group_size=group_size, permutation="random"))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [16, 48, 128])
def test_any_number_of_blocks(columns: int) -> None:
    assert_right(small_matrix(0, columns=columns, padding=3))


@pytest.mark.parametrize("group_size", [64, 128])
def test_groups_of_several_blocks(group_size: int) -> None:
    assert_right(small_matrix(0, columns=3 * group_size, group_size=group_size, stats_bits=None, outliers="none"))


@pytest.mark.slow
def test_no_row_is_read_as_many() -> None:
    """Rows alone and together are the same products."""
    w = small_matrix(0, outliers="one row")
    x = np.random.default_rng(1).standard_normal((3, w.in_features), np.float32)
    together = spqr_matmul(x, w, implementation="xla")
    alone = jnp.concatenate([PRODUCT(x[i : i + 1], w) for i in range(3)])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5 * np.abs(together).max())
