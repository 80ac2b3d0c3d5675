import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg.cython_lapack  # noqa: F401
from threadpoolctl import threadpool_info, threadpool_limits

from spqr_jax.runtime.lapack import in_one_thread


def threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_lapack_keeps_to_one_thread_and_gets_its_threads_back():
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        assert in_one_thread(threads) == {1}
        assert threads() == before
        with pytest.raises(ZeroDivisionError):
            in_one_thread(lambda: 1 // 0)
        assert threads() == before


def test_the_result_is_that_of_the_program():
    matrix = np.eye(3) + 0.1
    np.testing.assert_array_equal(in_one_thread(jnp.linalg.cholesky, matrix), jnp.linalg.cholesky(matrix))
