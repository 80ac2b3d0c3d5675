"""Totals over packed matrices, counted from their parts."""

from typing import Any

import numpy as np
import pytest
from helpers.random_formats import small_matrix

from pallas_kernels import SpqrTensor, bits_per_weight, split_rows
from pallas_kernels.format.stacks import stack
from spqr_jax import summarize
from spqr_jax.storage.totals import summarize_described


def described(packed: SpqrTensor) -> dict[str, Any]:
    outliers = None if packed.outliers is None else len(packed.outliers.values)
    return {"shape": packed.shape, "bytes": packed.nbytes, "outliers": outliers}


def test_totals_over_matrices_with_and_without_outliers() -> None:
    some, none = small_matrix(0, out=64), small_matrix(1, columns=128, outliers="none")
    params = {"a": {"kernel": some}, "b": {"kernel": none, "bias": np.ones(32)}, "norm": np.ones(64)}
    totals = summarize(params)
    assert totals.weights == 64 * 64 + 32 * 128
    bits = (bits_per_weight(some) * 64 * 64 + bits_per_weight(none) * 32 * 128) / totals.weights
    assert totals.bits_per_weight == pytest.approx(bits)
    assert totals.outlier_share == len(some.outliers.values) / totals.weights
    assert totals.parameters == totals.weights + 32 + 64
    assert totals.nbytes == some.nbytes + none.nbytes + 8 * (32 + 64)
    assert totals.bits_per_parameter == pytest.approx(8 * totals.nbytes / totals.parameters)
    dense = {name: {"shape": [size], "bytes": 8 * size} for name, size in (("b.bias", 32), ("norm", 64))}
    header = {"matrices": {"a": described(some), "b": described(none)}, "dense": dense}
    assert summarize_described(header) == pytest.approx(totals)


def test_stacks_count_as_their_matrices() -> None:
    matrices = [small_matrix(seed, out=64) for seed in range(3)]
    apart = summarize(matrices)
    for stacked in (stack(matrices), [split_rows(matrix, 2) for matrix in matrices]):
        totals = summarize(stacked)
        assert (totals.weights, totals.outlier_share) == (apart.weights, apart.outlier_share)
        assert totals.bits_per_weight > apart.bits_per_weight


def test_a_dense_model_has_no_packed_weights() -> None:
    totals = summarize({"kernel": np.ones((4, 4), np.float16)})
    assert totals == (0, 0, 0, 16, 32)
    assert totals.sizes() == {"parameters": 16, "bits_per_parameter": 16, "bytes_of_parameters": 32}
