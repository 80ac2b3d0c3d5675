"""The official GPU format against what the official tools write and read, bit for bit, and against our own tensors."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from helpers.official_goldens import DENSE_ONLY, FULL, assert_same_bits, in_ptcsr, packed_matrix, weight_in_order
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import ConversionError
from converters.formats.official.quantized_matrix import StoredOutliers, StoredStatistics, quantized_tensor
from converters.formats.official.tiles import (
    TiledMatrix,
    decode_arrays,
    decode_tensor,
    encode_arrays,
    encode_tensor,
    reader_weight,
)
from pallas_kernels import SpqrTensor

ROUNDING = 2.0**-11
"""Half a unit in the last of float16's eleven digits, relative to the number."""


def places(matrix: TiledMatrix) -> tuple[np.ndarray, np.ndarray]:
    return matrix.outliers.rows, matrix.outliers.columns


def summed(matrix: TiledMatrix) -> np.ndarray:
    """The official reader's sum of weights and outliers, float32."""
    weight = reader_weight(matrix).astype(np.float32)
    weight[places(matrix)] += matrix.outliers.values
    return weight


def reader_rounding(matrix: TiledMatrix) -> np.ndarray:
    """How far float16 arithmetic can be from exact arithmetic on the same stored numbers, to first order."""
    s, z = (np.repeat(part.values(np.float32), 16, axis=1) for part in (matrix.scale, matrix.zero))
    terms = np.abs(matrix.codes - z)
    return 1.01 * ROUNDING * (np.abs(s) * (4 * terms + 2 * np.abs(z)))


# Against the official tools


@pytest.mark.parametrize("name", ["k_proj", "q_proj"])
def test_official_arrays_are_read_and_written_bit_for_bit(name: str) -> None:
    csr, shape, content = packed_matrix(name)
    ptcsr = in_ptcsr(content)
    assert not np.array_equal(csr["col_vals"], ptcsr["col_vals"])
    for arrays in (csr, ptcsr):
        matrix = decode_arrays(arrays, shape, name)
        assert_same_bits(reader_weight(matrix), content, DENSE_ONLY)
        assert_same_bits(summed(matrix).astype(np.float16), content, FULL)
        for order, written in (("csr", csr), ("ptcsr", ptcsr)):
            encoded = encode_arrays(matrix, order)
            assert encoded.keys() == written.keys()
            for part in written:
                assert encoded[part].dtype == written[part].dtype
                np.testing.assert_array_equal(encoded[part], written[part])


@pytest.mark.parametrize("name", ["k_proj", "q_proj"])
def test_an_outlier_has_its_own_value(name: str) -> None:
    arrays, shape, _ = packed_matrix(name)
    matrix = decode_arrays(arrays, shape, name)
    tensor = decode_tensor(arrays, shape, name)
    weight, official, bound = weight_in_order(tensor), reader_weight(matrix).astype(np.float32), reader_rounding(matrix)
    residuals = tensor.outliers.values.astype(np.float32)
    official[places(matrix)] = matrix.outliers.values
    bound[places(matrix)] = 1.01 * ROUNDING * np.abs(residuals)
    assert (np.abs(weight - official) <= bound).all()
    # Where the official reader for GPUs is off by the weight of the code beneath.
    assert np.abs(residuals - matrix.outliers.values).max() > 0.1
    np.testing.assert_array_equal(tensor.permutation, arrays["in_perm"].view(np.uint16))


@pytest.mark.parametrize("name", ["k_proj", "q_proj"])
def test_the_official_reader_computes_the_weights_that_we_write(name: str) -> None:
    arrays, shape, _ = packed_matrix(name)
    tensor = decode_tensor(arrays, shape, name)
    written = decode_arrays(encode_tensor(tensor, name), shape, name)
    read, weight = summed(written), weight_in_order(tensor)
    outlier = np.zeros(shape, bool)
    outlier[places(written)] = True
    assert (np.abs(read - weight)[~outlier] <= reader_rounding(written)[~outlier]).all()

    target = weight.astype(np.float16)
    missed = np.nonzero(outlier & (read.astype(np.float16) != target))
    assert 0 < len(missed[0]) < 0.02 * outlier.sum()
    # No code and no value at all gives the weight where ours do not.
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].astype(np.float32)
    scale, zero = (part.values(np.float16) for part in (written.scale, written.zero))
    for row, column in zip(*missed, strict=True):
        group = row, column // 16
        for code in np.arange(8, dtype=np.float16):
            beneath = (scale[group] * (code - zero[group])).astype(np.float32)
            assert not ((beneath + every).astype(np.float16) == target[row, column]).any()


def test_a_word_has_its_bits_where_the_format_says() -> None:
    matrix = random_matrix(np.random.default_rng(0), out=32, groups=3, share=0.1)
    matrix = replace(matrix, permutation=np.random.default_rng(0).permutation(48).astype(np.uint16))
    arrays = encode_arrays(matrix)
    row, group = 21, 2
    numbers = [matrix.scale.scale, matrix.zero.scale, matrix.scale.zero, matrix.zero.zero]
    octets = b"".join(number[row // 16, group].tobytes() for number in numbers)
    fields = [matrix.scale.codes[row, group], matrix.zero.codes[row, group]]
    fields += list(matrix.codes[row, 16 * group : 16 * group + 16])
    expected = sum(int(field) << 3 * k for k, field in enumerate(fields)) + (octets[row % 16 // 2] << 54)
    # The second row of tiles, its third tile, the sixth row.
    assert arrays["dense_weights"][16 * (3 * 1 + 2) + 5] == expected

    first = matrix.outliers.offsets[row]
    entry = int(arrays["col_vals"][first]) & 0xFFFFFFFF
    assert entry & 0xFFFF == matrix.outliers.columns[first]
    assert entry >> 16 == int(matrix.outliers.values[first].view(np.uint16))
    assert arrays["in_perm"][1] == int(matrix.permutation[2]) + (int(matrix.permutation[3]) << 16)


# Round trips


def random_matrix(rng: np.random.Generator, out: int, groups: int, share: float) -> TiledMatrix:
    """Zeros lie in the range of the codes, and outliers are up to 30 times as large as other weights."""
    shape = out, 16 * groups
    coarse = out // 16, groups
    mask = rng.random(shape) < share
    offsets = np.concatenate([[0], mask.sum(axis=1).cumsum()]).astype(np.int32)
    values = (rng.normal(0, 1, mask.sum()) * 10.0 ** rng.integers(-2, 2, mask.sum())).astype(np.float16)
    values[values == 0] = 1

    def statistics(low: float, high: float) -> StoredStatistics:
        step = rng.uniform((high - low) / 14, (high - low) / 7, coarse).astype(np.float16)
        zero = (-rng.uniform(low, low + (high - low) / 2, coarse) / step).astype(np.float16)
        return StoredStatistics(rng.integers(0, 8, (out, groups), np.uint8), step, zero)

    return TiledMatrix(
        rng.integers(0, 8, shape, np.uint8),
        statistics(0.02, 0.3),
        statistics(-1, 9),
        StoredOutliers(offsets, np.nonzero(mask)[1].astype(np.uint16), values),
        rng.permutation(shape[1]).astype(np.uint16) if rng.random() < 0.7 else None,
    )


matrices = st.builds(
    random_matrix,
    st.integers(0, 2**32 - 1).map(np.random.default_rng),
    out=st.sampled_from([16, 48]),
    groups=st.sampled_from([1, 2, 5]),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


def assert_same(actual: Any, expected: Any) -> None:
    # Lists, because a TiledMatrix is no pytree.
    left, right = (jax.tree.leaves([m.codes, m.scale, m.zero, m.outliers, m.permutation]) for m in (actual, expected))
    assert [part.dtype for part in left] == [part.dtype for part in right]
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


@given(matrices, st.sampled_from(["csr", "ptcsr"]))
def test_a_matrix_comes_back(matrix: TiledMatrix, order: str) -> None:
    decoded = decode_arrays(encode_arrays(matrix, order), matrix.codes.shape, "matrix")
    assert_same(decoded, matrix)


@pytest.mark.slow
@settings(max_examples=15)
@given(matrices)
def test_a_tensor_comes_back(matrix: TiledMatrix) -> None:
    shape = matrix.codes.shape
    tensor = decode_tensor(encode_arrays(matrix), shape, "matrix")
    arrays = encode_tensor(tensor, "matrix")
    back = decode_tensor(arrays, shape, "matrix", added=True)
    weight, returned = weight_in_order(tensor), weight_in_order(back)
    rows, columns = places(matrix)
    beneath = np.abs(back.outliers.values.astype(np.float32))
    # The weight, the value that is added, and our residual are each rounded once.
    read = decode_arrays(arrays, shape, "matrix").outliers.values.astype(np.float32)
    bound = 1.01 * ROUNDING * (np.abs(weight[rows, columns]) + np.abs(read) + beneath) + 2.0**-24
    assert (np.abs(returned - weight)[rows, columns] <= bound).all()
    returned[rows, columns] = weight[rows, columns]
    np.testing.assert_array_equal(returned, weight)
    if matrix.permutation is None:
        assert tensor.permutation is None
        np.testing.assert_array_equal(arrays["in_perm"].view(np.uint16), np.arange(shape[1]))
    else:
        np.testing.assert_array_equal(back.permutation, tensor.permutation)


def test_padding_of_ptcsr_may_stand_anywhere() -> None:
    matrix = random_matrix(np.random.default_rng(1), out=16, groups=1, share=0.0)
    arrays = encode_arrays(matrix)
    words = np.zeros((3, 16), np.int32)
    words[2, 5] = (0x3C00 << 16) + 7
    arrays |= {"row_offsets": np.array([0, 48], np.int32), "col_vals": words.reshape(-1)}
    outliers = decode_arrays(arrays, (16, 16), "matrix").outliers
    assert (outliers.rows, outliers.columns, outliers.values) == (5, 7, 1.0)


# What cannot be read


def broken(part: str, change: Any) -> dict[str, np.ndarray]:
    arrays, _, _ = packed_matrix("k_proj")
    arrays[part] = change(arrays[part].copy())
    return arrays


def put(index: Any, value: Any) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("dense_weights", lambda a: a[:-1], r"k\.dense_weights has 6911 entries, but 192 × 576 takes 6912"),
        ("dense_weights", lambda a: a.astype(np.float32), r"k\.dense_weights is float32 .*int64"),
        ("dense_weights", lambda a: a | 1 << 62, r"6912 words with bit 62 or 63"),
        ("dense_weights", lambda a: a ^ (np.arange(6912) == 3) << 54, r"1 pairs of rows"),
        ("dense_weights", lambda a: a | 0xFF << 54, r"second-level statistics of k have 1728 of 1728"),
        ("row_offsets", lambda a: a[:-1], r"k\.row_offsets has 192 entries, but 192 rows take 193 .* or 13"),
        ("row_offsets", put(0, 1), r"rise from 0 to the 2187 entries of col_vals, but runs from 1"),
        ("row_offsets", put(-1, 2186), r"to 2186"),
        ("row_offsets", put(5, 2000), r"falls 1 times"),
        ("row_offsets", lambda a: a.astype(np.int64), r"k\.row_offsets is int64"),
        ("col_vals", put(slice(0, 2), 0x3C000007), r"1 of 2187 outliers at a place that has one already"),
        ("col_vals", put(9, 0x3C000240), r"column 576, but only 576"),
        ("col_vals", put(9, 0x7C000001), r"outliers of k have 1 of 2187 values that are not finite"),
        ("in_perm", lambda a: a[1:], r"k\.in_perm has 287 entries, but 192 × 576 takes 288"),
        ("in_perm", put(0, 0), r"permutation of k lacks [12] of 576"),
    ],
)
def test_contradictory_arrays(part: str, change: Any, named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        decode_arrays(broken(part, change), (192, 576), "k")


def test_ptcsr_comes_in_sixteens() -> None:
    arrays = in_ptcsr(packed_matrix("k_proj")[2])
    arrays["row_offsets"] = put(1, arrays["row_offsets"][1] + 8)(arrays["row_offsets"])
    with pytest.raises(ConversionError, match="1 entries that are not multiples of 16"):
        decode_arrays(arrays, (192, 576), "k")


@pytest.mark.parametrize("shape", [(200, 576), (192, 570), (0, 16), (16, 65552)])
def test_sizes_that_the_format_does_not_have(shape: tuple[int, int]) -> None:
    with pytest.raises(ConversionError, match=f"k is {shape[0]} × {shape[1]}"):
        decode_arrays(packed_matrix("k_proj")[0], shape, "k")


# What cannot be written


def our_tensor(out: int = 16, columns: int = 32, **options: Any) -> SpqrTensor:
    rng = np.random.default_rng(0)
    widths = {"bits": 3, "group_size": 16, "scale_bits": 3, "zero_bits": 3, "stats_group_size": 16, **options}
    groups = columns // widths["group_size"]

    def statistics(bits: int | None) -> Any:
        if bits is None:
            return rng.uniform(1, 2, (out, groups))
        coarse = out // widths["stats_group_size"], groups
        return StoredStatistics(np.zeros((out, groups), np.uint8), np.ones(coarse), -np.ones(coarse))

    scale, zero = statistics(widths["scale_bits"]), statistics(widths["zero_bits"])
    none = StoredOutliers(np.zeros(out + 1, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.float32))
    del widths["stats_group_size"]
    return quantized_tensor(np.zeros((out, columns), np.uint8), scale, zero, none, None, name="ours", **widths)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 4}, "bits 4,"),
        ({"group_size": 32}, "groups 32,"),
        ({"scale_bits": None}, "scale bits 16,"),
        ({"zero_bits": 5}, "zero bits 5,"),
        ({"out": 32, "stats_group_size": 32}, "scale statistics groups 32, zero statistics groups 32,"),
        ({"columns": 32784}, "16 × 32784, .* columns up to 32768"),
    ],
)
def test_formats_that_cannot_be_written(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        encode_tensor(our_tensor(**options), "k")


def test_a_tensor_without_outliers_is_written() -> None:
    tensor = replace(our_tensor(), outliers=None)
    arrays = encode_tensor(tensor, "k")
    assert arrays["col_vals"].shape == (0,)
    np.testing.assert_array_equal(weight_in_order(decode_tensor(arrays, (16, 32), "k")), weight_in_order(tensor))


def test_overflow_of_the_readers_arithmetic() -> None:
    tensor = our_tensor()
    large = replace(tensor, scale_scale=tensor.scale_scale * 60000, zero_scale=tensor.zero_scale * 3)
    assert np.isfinite(weight_in_order(large)).all()
    with pytest.raises(ConversionError, match=r"weights that the official reader computes for k"):
        encode_tensor(large, "k")


def test_residuals_beyond_float16() -> None:
    matrix = random_matrix(np.random.default_rng(2), out=16, groups=1, share=0.0)
    scale = matrix.scale._replace(scale=np.full((1, 1), 8000, np.float16), zero=np.full((1, 1), -1, np.float16))
    zero = matrix.zero._replace(scale=np.full((1, 1), 1, np.float16), zero=np.full((1, 1), 4, np.float16))
    outliers = StoredOutliers(
        np.repeat([0, 1], [1, 16]).astype(np.int32), np.array([3], np.uint16), np.float16([60000])
    )
    zero = zero._replace(codes=np.full((16, 1), 7, np.uint8))
    codes = np.zeros_like(matrix.codes)
    arrays = encode_arrays(TiledMatrix(codes, scale, zero, outliers, None))
    with pytest.raises(ConversionError, match="outliers' residuals of k have 1 of 1"):
        decode_tensor(arrays, (16, 16), "k")
