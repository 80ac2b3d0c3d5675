"""Rows of packed matrices, joined and split: weights stay what they are, to the bit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_formats import DEQUANTIZE, OUTLIERS, formats, small_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    SpqrTensor,
    bits_per_weight,
    concatenate_rows,
    split_rows,
    spqr_matmul,
    trim,
)
from pallas_kernels.format.stacks import element, stack


@settings(max_examples=4)
@given(
    formats(),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(1, 2), st.sampled_from(OUTLIERS)), min_size=1, max_size=3),
)
def test_joined_rows_are_the_rows_that_were(options: dict[str, Any], seed: int, parts: list[tuple[int, str]]) -> None:
    unit = options["stats_group_size"] if options["stats_bits"] else 1
    tensors = [
        small_matrix(seed + index, out=unit * times, outliers=outliers, **options)
        for index, (times, outliers) in enumerate(parts)
    ]
    joined = concatenate_rows(tensors)
    assert joined.shape == (sum(tensor.shape[0] for tensor in tensors), options["columns"])
    expected = np.concatenate([DEQUANTIZE(tensor) for tensor in tensors])
    np.testing.assert_array_equal(DEQUANTIZE(joined), expected)
    assert (joined.outliers is None) == all(outliers == "none" for _, outliers in parts)
    if joined.outliers is not None:
        assert len(joined.outliers.values) == len(joined.outliers.columns) == joined.outliers.offsets[-1]
        assert joined.outliers.offsets.dtype == jnp.int32


@pytest.mark.slow
@settings(max_examples=4)
@given(formats(), st.integers(0, 2**32 - 1), st.sampled_from(OUTLIERS), st.integers(1, 3), st.integers(1, 2))
def test_split_rows_are_the_rows_that_were(
    options: dict[str, Any], seed: int, outliers: str, parts: int, times: int
) -> None:
    unit = options["stats_group_size"] if options["stats_bits"] else 1
    tensor = small_matrix(seed, out=parts * times * unit, outliers=outliers, **options)
    split = split_rows(tensor, parts)
    assert all(len(array) == parts for array in split.arrays().values())
    pieces = [element(split, index) for index in range(parts)]
    assert {piece.shape for piece in pieces} == {(times * unit, options["columns"])}
    np.testing.assert_array_equal(np.concatenate([DEQUANTIZE(piece) for piece in pieces]), DEQUANTIZE(tensor))
    whole, again = trim(tensor), concatenate_rows(pieces)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_padding_of_split_outliers_is_zero() -> None:
    tensor = small_matrix(0, outliers="one row", padding=5)
    split = split_rows(tensor, 2)
    assert split.outliers is not None
    assert split.outliers.values.shape == split.outliers.columns.shape == (2, 64)
    counts = np.asarray(split.outliers.offsets)[:, -1]
    assert sorted(counts) == [0, 64]
    for array in (split.outliers.values, split.outliers.columns):
        assert not np.asarray(array)[np.argmin(counts)].any()


def test_stacked_matrices_are_joined_one_by_one() -> None:
    kinds = [
        [small_matrix(10 * kind + i, outliers=o) for i, o in enumerate(("empty", "everywhere"))] for kind in range(2)
    ]
    joined = concatenate_rows([stack(tensors) for tensors in kinds])
    for index in range(2):
        expected = concatenate_rows([tensors[index] for tensors in kinds])
        jax.tree.map(np.testing.assert_array_equal, element(joined, index), expected)


def test_arrays_in_host_memory_stay_there() -> None:
    tensors = [small_matrix(seed) for seed in range(2)]
    joined, on_host = concatenate_rows(tensors), concatenate_rows(jax.device_get(tensors))
    assert isinstance(joined.codes, jax.Array)
    assert isinstance(on_host.codes, np.ndarray)
    jax.tree.map(np.testing.assert_array_equal, on_host, joined)


def test_one_permutation_serves_all_rows() -> None:
    permutation = np.random.default_rng(3).permutation(64)
    tensors = [small_matrix(seed, permutation=permutation, outliers="none") for seed in range(3)]
    assert bits_per_weight(concatenate_rows(tensors)) == bits_per_weight(tensors[0]) - 2 / 3 * 16 * 64 / (32 * 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": 128, "permutation": np.arange(128)},
            r"matrices that differ in input features \(64, 128\) cannot be rows of one",
        ),
        ({"bits": 4}, r"matrices that differ in bits \(3, 4\)"),
        ({"group_size": 32}, r"matrices that differ in group size \(16, 32\)"),
        ({"stats_bits": 4}, r"differ in scales \(3 bits by 16 rows in float16, 4 bits by 16 rows in float16\)"),
        ({"stats_bits": None}, r"differ in scales \(3 bits by 16 rows in float16, float16\)"),
        ({"stats_group_size": 32}, r"differ in scales \(3 bits by 16 rows in float16, 3 bits by 32 rows in float16\)"),
        ({"stats_dtype": "float32"}, r"differ in scales \(3 bits by 16 rows in float16, .* in float32\)"),
        ({"permutation": np.arange(64)[::-1]}, "matrices 0 and 1 have different permutations"),
    ],
)
def test_what_rows_share_must_be_equal(options: dict[str, Any], message: str) -> None:
    permutation = np.arange(64)
    first, second = (
        small_matrix(0, permutation=permutation),
        small_matrix(1, **{"permutation": permutation} | options),
    )
    with pytest.raises(ValueError, match=message):
        concatenate_rows([first, second])


def test_a_permutation_and_none_are_different() -> None:
    with pytest.raises(ValueError, match="matrices 0 and 1 have different permutations"):
        concatenate_rows([small_matrix(0), small_matrix(1, permutation=np.arange(64))])


def test_a_stack_and_a_matrix_are_not_joined() -> None:
    tensor = small_matrix(0)
    with pytest.raises(ValueError, match=r"differ in leading axes \(\(\), \(2,\)\)"):
        concatenate_rows([tensor, stack([tensor, tensor])])


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="there are no matrices to join"):
        concatenate_rows([])


@pytest.mark.parametrize(
    ("options", "parts", "message"),
    [
        ({"out": 48}, 2, "48 output rows do not divide into 2 parts of whole statistics groups of 16 rows"),
        ({"out": 64, "stats_group_size": 32}, 4, "64 output rows .* 4 parts of whole statistics groups of 32 rows"),
        ({"out": 10, "stats_bits": None}, 3, "10 output rows do not divide into 3 parts$"),
        ({}, 0, "32 output rows do not divide into 0 parts"),
    ],
)
def test_rows_that_do_not_divide(options: dict[str, Any], parts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_rows(small_matrix(0, **options), parts)


def test_a_stack_is_not_split() -> None:
    tensor = small_matrix(0)
    with pytest.raises(ValueError, match="a stack of 2 matrices cannot be split by rows"):
        split_rows(stack([tensor, tensor]), 2)


@pytest.mark.devices
def test_each_device_computes_its_rows() -> None:
    mesh = jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])
    packed = small_matrix(0, out=128, permutation=np.random.default_rng(1).permutation(64), outliers="one row")
    x = np.random.default_rng(2).standard_normal((5, 64), np.float32)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("model")), out_specs=P(None, "model"))
    def product(x: jax.Array, part: SpqrTensor) -> jax.Array:
        local = jax.tree.map(lambda array: array[0], part)
        assert local.shape == (32, 64)
        return spqr_matmul(x, local)

    y = jax.jit(product)(x, jax.device_put(split_rows(packed, 4), NamedSharding(mesh, P("model"))))
    assert len(y.sharding.device_set) == 4
    np.testing.assert_allclose(y, spqr_matmul(x, packed), rtol=1e-6, atol=1e-5)
