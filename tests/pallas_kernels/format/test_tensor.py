"""The packed format: what is stored, bit by bit, and what comes back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    QuantizedStatistics,
    bits_per_weight,
    check_format,
    outlier_share,
    pack,
    spqr_dequantize,
    trim,
)
from pallas_kernels.format.bit_layout import pack_codes, pack_planes, unpack_codes, unpack_planes
from pallas_kernels.format.tensor import BITS, GROUP_SIZES

PACK = jax.jit(pack, static_argnames=("bits", "group_size", "scale_bits", "zero_bits", "stats_dtype"))
DEQUANTIZE = jax.jit(spqr_dequantize)


@st.composite
def pack_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `pack` for a random matrix of any supported format."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits, group_size = draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUP_SIZES))
    scale_bits, zero_bits = (draw(st.sampled_from((None, *BITS))) for _ in range(2))
    stats_group_size = draw(st.sampled_from((16, 32)))
    out = stats_group_size * draw(st.integers(1, 3)) if scale_bits or zero_bits else draw(st.integers(2, 40))
    groups = draw(st.integers(1, 5))
    columns = groups * group_size

    def statistics(stats_bits: int | None) -> Any:
        if stats_bits is None:
            return rng.uniform(0.1, 4, (out, groups)).astype(np.float32)
        codes = rng.integers(0, 2**stats_bits, (out, groups), np.uint8)
        scale, zero = rng.uniform(0.1, 4, (2, out // stats_group_size, groups)).astype(np.float32)
        return QuantizedStatistics(codes, scale, zero)

    share = draw(st.sampled_from((None, 0.0, 0.05, 1.0)))
    residuals = rng.standard_normal((out, columns), np.float32)
    return {
        "codes": rng.integers(0, 2**bits, (out, columns), np.uint8),
        "scale": statistics(scale_bits),
        "zero": statistics(zero_bits),
        "bits": bits,
        "group_size": group_size,
        "scale_bits": scale_bits,
        "zero_bits": zero_bits,
        "outliers": None if share is None else (rng.random((out, columns)) < share, residuals),
        "permutation": rng.permutation(columns) if draw(st.booleans()) else None,
    }


def float16_values(statistics: Any) -> np.ndarray:
    """What scales or zeros are once they are stored, `[out, groups]` in float64."""
    if not isinstance(statistics, QuantizedStatistics):
        return statistics.astype(np.float16).astype(np.float64)
    repeats = len(statistics.codes) // len(statistics.scale)
    scale, zero = (
        np.repeat(s.astype(np.float16).astype(np.float64), repeats, axis=0) for s in (statistics.scale, statistics.zero)
    )
    return scale * (statistics.codes - zero)


def expected_weight(arguments: dict[str, Any]) -> np.ndarray:
    """scale · (code − zero) + residual in float64, column k at place permutation[k]."""
    scale, zero = (
        np.repeat(float16_values(arguments[name]), arguments["group_size"], axis=1) for name in ("scale", "zero")
    )
    ordered = scale * (arguments["codes"] - zero)
    if arguments["outliers"] is not None:
        mask, residuals = arguments["outliers"]
        ordered += np.where(mask, residuals.astype(np.float16).astype(np.float64), 0)
    if arguments["permutation"] is None:
        return ordered
    weight = np.empty_like(ordered)
    weight[:, arguments["permutation"]] = ordered
    return weight


def expected_bits(arguments: dict[str, Any]) -> int:
    """Size of the packed matrix by the format's table."""
    out, columns = arguments["codes"].shape
    groups = columns // arguments["group_size"]
    blocks = -(-columns // 16)
    total = arguments["bits"] * out * 16 * (blocks + blocks % 2)
    for name in ("scale", "zero"):
        if arguments[f"{name}_bits"] is None:
            total += 16 * out * groups
        else:
            total += arguments[f"{name}_bits"] * out * groups + 2 * 16 * arguments[name].scale.size
    if arguments["outliers"] is not None:
        total += 32 * (out + 1) + (16 + 16) * int(arguments["outliers"][0].sum())
    return total + (0 if arguments["permutation"] is None else 16 * columns)


@settings(max_examples=6)
@given(pack_arguments())
def test_what_is_packed_comes_back(arguments):
    untrimmed = PACK(**arguments)
    packed, codes, outliers = trim(untrimmed), arguments["codes"], arguments["outliers"]
    assert packed.shape == codes.shape
    assert packed.bits == arguments["bits"]
    np.testing.assert_array_equal(unpack_codes(packed.codes, codes.shape[1]), codes)
    for name in ("scale", "zero"):
        if arguments[f"{name}_bits"] is not None:
            np.testing.assert_array_equal(unpack_planes(getattr(packed, f"{name}_codes")), arguments[name].codes)
    assert bits_per_weight(packed) == expected_bits(arguments) / codes.size
    assert outlier_share(packed) == pytest.approx(0 if outliers is None else outliers[0].mean())

    weight, expected = DEQUANTIZE(packed), expected_weight(arguments)
    assert weight.dtype == jnp.float32
    # Statistics and residuals are rounded in `expected` too, so only float32 arithmetic is between the two.
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(DEQUANTIZE(untrimmed), weight)


def random_arguments(bits: int = 3, **options: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "codes": rng.integers(0, 2**bits, (32, 48), np.uint8),
        "scale": rng.uniform(0.1, 4, (32, 3)).astype(np.float32),
        "zero": rng.uniform(0.1, 4, (32, 3)).astype(np.float32),
        "bits": bits,
        "group_size": 16,
        "outliers": (rng.random((32, 48)) < 0.1, rng.standard_normal((32, 48), np.float32)),
        **options,
    }


def test_pack_is_the_same_under_jit():
    arguments = random_arguments(permutation=np.arange(48)[::-1])
    eager, jitted = pack(**arguments), PACK(**arguments)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_outliers_are_compressed_rows():
    mask, residuals = random_arguments()["outliers"]
    packed = trim(pack(**random_arguments()))
    rows, columns = np.nonzero(mask)
    np.testing.assert_array_equal(packed.outliers.offsets, np.searchsorted(rows, np.arange(33)))
    np.testing.assert_array_equal(packed.outliers.columns, columns)
    np.testing.assert_array_equal(packed.outliers.values, residuals[mask].astype(np.float16))


def test_stats_dtype_keeps_statistics_in_float32():
    arguments = random_arguments()
    packed = pack(**arguments, stats_dtype=jnp.float32)
    np.testing.assert_array_equal(packed.scale, arguments["scale"])
    np.testing.assert_array_equal(packed.zero, arguments["zero"])


def code_words(block: list[int], bits: int) -> list[int]:
    """Sixteen codes in `bits` words of sixteen bits: codes from the low bit up, the last one in what is left over."""
    words, per_word = [], 16 // bits
    for k in range(bits):
        word = 0
        for i in range(per_word):
            word |= block[k * per_word + i] << (bits * i)
        if per_word * bits < 16:
            word |= (block[15] >> k & 1) << 15
        words.append(word)
    return words


@pytest.mark.parametrize("columns", [48, 64, 8])
@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_where_the_format_says(bits, columns):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, columns), np.uint8)
    padded = np.pad(codes, ((0, 0), (0, -columns % 32)))
    half_blocks = padded.shape[1] // 32
    expected = np.empty((bits, 3, half_blocks), np.uint32)
    for row in range(3):
        words = [code_words(block.tolist(), bits) for block in padded[row].reshape(-1, 16)]
        for k in range(bits):
            for n in range(half_blocks):
                expected[k, row, n] = words[n][k] | words[n + half_blocks][k] << 16
    packed = pack_codes(jnp.array(codes), bits)
    assert packed.dtype == jnp.uint32
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpack_codes(packed, columns), codes)


def test_codes_written_by_hand():
    codes = [1, 2, 3, 4, 5, 0, 1, 0, 1, 0, 7, 7, 7, 7, 7, 6]
    packed = pack_codes(jnp.array([codes + codes[::-1]], jnp.uint8), 3)
    low = [0b0_101_100_011_010_001, 0b1_000_001_000_001_000, 0b1_111_111_111_111_111]
    # Backwards: 6 7 7 7 7 | 7 0 1 0 1 | 0 5 4 3 2 | 1
    high = [0b1_111_111_111_111_110, 0b0_001_000_001_000_111, 0b0_010_011_100_101_000]
    assert packed[:, 0, 0].tolist() == [a | b << 16 for a, b in zip(low, high, strict=True)]


@pytest.mark.parametrize("bits", BITS)
def test_planes_lie_where_the_format_says(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (48, 5), np.uint8)
    planes = pack_planes(jnp.array(codes), bits)
    assert planes.dtype == jnp.uint16
    assert planes.shape == (bits, 3, 5)
    for p, i, g in np.ndindex(planes.shape):
        assert int(planes[p, i, g]) == sum((int(codes[16 * i + r, g]) >> p & 1) << r for r in range(16))
    np.testing.assert_array_equal(unpack_planes(planes), codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 6}, r"bits is 6, but must be one of \(2, 3, 4, 5, 8\)"),
        ({"group_size": 24}, "group_size is 24"),
        ({"columns": 70}, "70 input features do not divide into groups of 16"),
        ({"columns": 65536 + 16}, "65552 input features are more than the format's 65536"),
        ({"scale_bits": 7}, "scale_bits is 7"),
        ({"zero_bits": 1}, "zero_bits is 1"),
        ({"stats_group_size": 24}, "stats_group_size is 24, but must be a multiple of 16"),
        ({"stats_group_size": 0}, "stats_group_size is 0"),
        ({"out": 40}, "40 output rows do not divide into statistics groups of 16"),
        ({"out": 40, "scale_bits": None}, "40 output rows"),
        ({"out": 48, "stats_group_size": 32}, "48 output rows do not divide into statistics groups of 32"),
    ],
)
def test_a_format_that_does_not_fit_is_an_error_with_the_numbers(changes, message):
    sizes = {"out": 32, "columns": 64, "bits": 3, "group_size": 16, "scale_bits": 3, "zero_bits": 3} | changes
    with pytest.raises(ValueError, match=message):
        check_format(**sizes)


def test_rows_need_not_divide_where_statistics_are_not_quantized():
    check_format(7, 64, bits=3, group_size=16, scale_bits=None, zero_bits=None)


def test_pack_checks_its_arguments():
    with pytest.raises(ValueError, match="48 input features do not divide into groups of 32"):
        pack(**random_arguments(group_size=32))
    quantized = QuantizedStatistics(jnp.zeros((32, 3), jnp.uint8), jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="quantized scales need scale_bits"):
        pack(**random_arguments(scale=quantized))
