"""Single rows of packed matrices: bit for bit those of the whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_formats import DEQUANTIZE, OUTLIERS, formats, small_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import SplitTensor, split_rows, split_take, spqr_take

TAKE = jax.jit(spqr_take)


@pytest.mark.slow
@settings(max_examples=25)
@given(form=formats(), outliers=st.sampled_from(OUTLIERS), seed=st.integers(0, 2**32 - 1))
def test_rows_are_those_of_the_whole_matrix(form, outliers, seed):
    packed = small_matrix(seed, outliers=outliers, **form)
    rows = np.random.default_rng(seed).integers(0, packed.shape[0], (2, 5))
    np.testing.assert_array_equal(TAKE(packed, rows), DEQUANTIZE(packed)[rows])


def test_rows_of_any_number_and_type():
    packed = small_matrix(0, outliers="one row")
    whole = DEQUANTIZE(packed)
    assert spqr_take(packed, jnp.zeros((0,), jnp.int32)).shape == (0, 64)
    np.testing.assert_array_equal(spqr_take(packed, np.array(3, np.uint8)), whole[3])
    np.testing.assert_array_equal(
        spqr_take(packed, np.array([31, 31]), jnp.bfloat16), whole[jnp.array([31, 31])].astype("bfloat16")
    )


@pytest.mark.devices
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_rows_are_found_on_the_device_that_has_them(devices):
    packed = small_matrix(0, out=64, stats_group_size=16, permutation="random")
    mesh = jax.make_mesh((devices,), ("model",))
    parts = jax.device_put(split_rows(packed, devices), jax.NamedSharding(mesh, jax.P("model")))
    rows = jnp.arange(64).reshape(2, 32)
    np.testing.assert_array_equal(
        split_take(SplitTensor(parts, None, by="rows", mesh=mesh), rows), DEQUANTIZE(packed)[rows]
    )
