"""The solver against the official SpQR code's results, against a plain NumPy implementation, and its properties."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.same import assert_equal

from pallas_kernels import SpqrTensor, outlier_share, spqr_dequantize, trim
from pallas_kernels.format.bit_layout import unpack_codes, unpack_planes
from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.factorize import factorize
from spqr_jax.quantization.solver import quantize_matrix, quantize_shared

GOLDENS = Path(__file__).parents[2] / "goldens"
DEQUANTIZE = jax.jit(spqr_dequantize)
SLOW = pytest.mark.slow
SMALL = SpqrConfig()
GPTQ = replace(SMALL, outlier_threshold=None)


def weight_codes(packed: SpqrTensor) -> np.ndarray:
    return np.asarray(unpack_codes(packed.codes, packed.in_features))


def outlier_mask(packed: SpqrTensor) -> np.ndarray:
    """Which weights are outliers, in quantization order."""
    mask = np.zeros(packed.shape, bool)
    if packed.outliers is not None:
        rows = np.repeat(np.arange(packed.shape[0]), np.diff(packed.outliers.offsets))
        mask[rows, packed.outliers.columns[: len(rows)]] = True
    return mask


def weighted_loss(weight: np.ndarray, approximation: np.ndarray, hessian: np.ndarray) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) in float64."""
    error = np.asarray(weight, np.float64) - np.asarray(approximation, np.float64)
    return float(((error @ hessian) * error).sum())


# Against the official code


@pytest.fixture(scope="module")
def inputs():
    """Weights of SmolLM2-135M's first block and the Hessian that they share."""
    with np.load(GOLDENS / "inputs.npz") as file:
        arrays = dict(file)
    upper = np.zeros((576, 576), np.float32)
    upper[np.triu_indices(576)] = arrays.pop("hessian_triangle")
    return arrays | {"hessian": upper + np.triu(upper, 1).T}


def load_official(name: str) -> tuple[dict[str, np.ndarray], SpqrConfig]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = dict(file)
    settings = json.loads(str(arrays.pop("config")))
    renamed = {"stat_group_size": "stats_group_size", "percdamp": "damping"}
    given = {renamed.get(key, key): value for key, value in settings.items()}
    return arrays, SpqrConfig(**given, stats_dtype="float32")


def official_weight(official: dict[str, np.ndarray], config: SpqrConfig) -> np.ndarray:
    """The official result as a dense weight, columns in the order of the input features."""

    def statistics(name: str) -> np.ndarray:
        if name in official:
            return official[name]
        scale, zero = (
            np.repeat(official[f"{name}_{part}"], config.stats_group_size, axis=0) for part in ("scale", "zero")
        )
        return scale * (official[f"{name}_codes"] - zero)

    scale, zero = (np.repeat(statistics(name), config.group_size, axis=1) for name in ("scale", "zero"))
    ordered = scale * (official["codes"] - zero)
    ordered[official["outlier_mask"]] = official["outlier_values"]
    return ordered[:, np.argsort(official["permutation"])]


def few(different: np.ndarray) -> bool:
    """At most one in 10,000, for rounding that falls on the other side."""
    return different.sum() <= different.size // 10_000


OFFICIAL = ("spqr3", "gptq3")
OFFICIAL_TOO = ("spqr4", "spqr2_g32", "spqr3_g8", "spqr3_identity", "simplified")


@pytest.mark.parametrize("name", [*OFFICIAL, *(pytest.param(name, marks=SLOW) for name in OFFICIAL_TOO)])
def test_the_official_code_gives_the_same_k_proj(inputs, name):
    official, config = load_official(f"k_proj.{name}")
    packed = quantize_matrix(jnp.array(inputs["k_proj"]), inputs["hessian"], config)
    permutation = np.arange(576) if packed.permutation is None else packed.permutation
    np.testing.assert_array_equal(permutation, official["permutation"])
    assert few(weight_codes(packed) != official["codes"])
    assert few(outlier_mask(packed) != official["outlier_mask"])
    if config.scale_bits is None:
        np.testing.assert_allclose(packed.scale, official["scale"], rtol=1e-4)
        np.testing.assert_allclose(packed.zero, official["zero"], rtol=1e-4)
    else:
        for level in ("scale", "zero"):
            assert few(np.asarray(unpack_planes(getattr(packed, f"{level}_codes"))) != official[f"{level}_codes"])
            for part in ("scale", "zero"):
                array = f"{level}_{part}"
                # Zeros are counted in steps: near 0, a thousandth of one.
                atol = 1e-3 if part == "zero" else 0
                np.testing.assert_allclose(getattr(packed, array), official[array], rtol=1e-4, atol=atol, err_msg=array)
    difference = np.abs(DEQUANTIZE(packed) - official_weight(official, config))
    # The residual of an outlier, below 8 here, is rounded to float16.
    is_outlier = official["outlier_mask"][:, np.argsort(permutation)]
    assert few(difference > np.where(is_outlier, 2e-3, 2e-4))


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_q_proj_is_as_good_as_the_official_code_makes_it(inputs, name):
    official, config = load_official(f"q_proj.{name}")
    weight, hessian = inputs["q_proj"], inputs["hessian"]
    packed = quantize_matrix(jnp.array(weight), hessian, config)
    official_loss = weighted_loss(weight, official_weight(official, config), hessian)
    assert weighted_loss(weight, DEQUANTIZE(packed), hessian) <= 1.0005 * official_loss


@pytest.mark.slow
def test_statistics_in_float16_cost_little(inputs):
    _, config = load_official("k_proj.spqr3")
    weight, hessian = inputs["k_proj"], inputs["hessian"]
    losses = [
        weighted_loss(weight, DEQUANTIZE(quantize_matrix(jnp.array(weight), hessian, c)), hessian)
        for c in (config, replace(config, stats_dtype="float16"))
    ]
    # Rounding moves a value by some 2⁻⁹ of a step, and with it the codes near a tie: 1.005 times the loss.
    assert losses[1] <= 1.01 * losses[0]


# Against a plain implementation


def reference_solve(
    weight: np.ndarray, hessian: np.ndarray | None, config: SpqrConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense result, codes and outlier mask: the algorithm in float64, one weight at a time, no shortcuts."""
    out, columns = weight.shape
    size, max_code = config.group_size, 2**config.bits - 1
    order, factor = np.arange(columns), np.eye(columns)
    if hessian is not None:
        if config.permutation == "act_order":
            order = np.argsort(-np.diag(hessian), kind="stable")
        damping = config.damping * np.mean(np.abs(np.diag(hessian)))
        damped = hessian.astype(np.float64)[np.ix_(order, order)] + damping * np.eye(columns)
        factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    w = weight.astype(np.float64)[:, order]
    diagonal = np.diag(factor)
    threshold = np.inf
    if config.outlier_threshold is not None:
        threshold = config.outlier_threshold * np.mean(w.var(axis=0, ddof=1) / diagonal**2)

    def quantize(values, scale, zero, largest=max_code):
        codes = np.clip(np.round(values / scale + zero), 0, largest)
        return codes, scale * (codes - zero)

    def min_max(values, largest=max_code):
        low, high = (values.min(), values.max()) if len(values) else (0, 0)
        if low == high:
            low, high = -1, 1
        return (high - low) / largest, -low * largest / (high - low)

    def loss(values, sensitivity):
        return (sensitivity * (values - quantize(values, *min_max(values))[1]) ** 2).sum()

    def gain(values, sensitivity, k):
        return loss(values, sensitivity) - loss(np.delete(values, k), np.delete(sensitivity, k))

    def least_error(values, sensitivity):
        low, high = (values.min(), values.max()) if len(values) else (0, 0)
        low, high = (low, high) if low < high else (-1, 1)
        cuts = itertools.product((0, 0.1, 0.2), repeat=2)
        ranges = [np.array([low + a * (high - low), high - b * (high - low)]) for a, b in cuts]
        errors = [sensitivity * (values - quantize(values, *min_max(ends))[1]) ** 2 for ends in ranges]
        return min_max(ranges[np.argmin([np.minimum(e, threshold).sum() for e in errors])])

    def stored(values, bits):
        dtype = np.dtype(config.stats_dtype)
        if bits is None:
            return values.astype(dtype).astype(np.float64)
        result = np.empty_like(values)
        for start in range(0, out, config.stats_group_size):
            rows = slice(start, start + config.stats_group_size)
            scale, zero = (float(dtype.type(s)) for s in min_max(values[rows], 2**bits - 1))
            result[rows] = quantize(values[rows], scale, zero, 2**bits - 1)[1]
        return result

    dense, codes, outliers = np.empty_like(w), np.empty(w.shape, int), np.empty(w.shape, bool)
    for start in range(0, columns, size):
        group = slice(start, start + size)
        statistics = []
        sensitivity = 1 / diagonal[group] ** 2
        for values in w[:, group]:
            kept = np.full(size, True)
            if threshold < np.inf and not config.simplified:
                kept = np.array([gain(values, sensitivity, k) <= threshold for k in range(size)])
            least = config.fit == "error"
            statistics.append(least_error(values[kept], sensitivity[kept]) if least else min_max(values[kept]))
        scale, zero = np.array(statistics).T
        scale, zero = stored(scale, config.scale_bits), stored(zero, config.zero_bits)
        for j in range(start, start + size):
            codes[:, j], dense[:, j] = quantize(w[:, j], scale, zero)
            error = (w[:, j] - dense[:, j]) / diagonal[j]
            outliers[:, j] = is_outlier = error**2 > threshold
            codes[is_outlier, j] = quantize(0 * zero, scale, zero)[0][is_outlier]
            dense[is_outlier, j] = w[is_outlier, j]
            error[is_outlier] = 0
            w[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
    return dense[:, np.argsort(order)], codes, outliers


def random_matrix(seed: int, out: int = 32, columns: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A weight with some heavy values, and the Hessian of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    x *= rng.uniform(0.2, 2, columns)
    return rng.standard_t(4, (out, columns)).astype(np.float32), (x.T @ x).astype(np.float32)


@pytest.mark.parametrize(
    ("config", "calibrated"),
    [
        pytest.param(SMALL, True, id="spqr"),
        pytest.param(
            replace(SMALL, group_size=8, bits=2, scale_bits=None, permutation="identity"), True, id="mixed", marks=SLOW
        ),
        pytest.param(replace(SMALL, simplified=True, stats_dtype="float32"), True, id="simplified", marks=SLOW),
        pytest.param(replace(GPTQ, bits=4, stats_group_size=32, stats_dtype="float32"), True, id="gptq", marks=SLOW),
        pytest.param(replace(SMALL, fit="error"), True, id="fitted by error", marks=SLOW),
        pytest.param(replace(GPTQ, fit="error"), True, id="gptq, fitted by error", marks=SLOW),
        pytest.param(SMALL, False, id="round-to-nearest"),
    ],
)
def test_a_plain_implementation_gives_the_same(config, calibrated):
    for seed in range(3):
        weight, hessian = random_matrix(seed)
        packed = quantize_matrix(weight, hessian if calibrated else None, config)
        dense, codes, outliers = reference_solve(weight, hessian if calibrated else None, config)
        # A value halfway between two codes may go either way in float32, and then changes the rest of its row.
        same_rows = ((weight_codes(packed) == codes) & (outlier_mask(packed) == outliers)).all(axis=1)
        assert same_rows.sum() >= len(weight) - 1
        approximation = np.asarray(DEQUANTIZE(packed))
        np.testing.assert_allclose(approximation[same_rows], dense[same_rows], rtol=1e-3, atol=1e-3)
        loss, expected = (weighted_loss(weight, a, hessian) for a in (approximation, dense))
        assert loss == pytest.approx(expected, rel=1e-3)


# Properties


def test_result_beats_round_to_nearest():
    for seed in range(3):
        weight, hessian = random_matrix(seed)
        losses = [
            weighted_loss(weight, DEQUANTIZE(quantize_matrix(weight, h, SMALL)), hessian) for h in (hessian, None)
        ]
        assert losses[0] < 0.7 * losses[1]


def test_statistics_groups_are_independent():
    weight, hessian = random_matrix(0)
    swapped = quantize_matrix(np.roll(weight, 16, axis=0), hessian, SMALL)
    packed = quantize_matrix(weight, hessian, SMALL)
    np.testing.assert_array_equal(weight_codes(swapped), np.roll(weight_codes(packed), 16, axis=0))
    np.testing.assert_allclose(DEQUANTIZE(swapped), np.roll(DEQUANTIZE(packed), 16, axis=0), rtol=1e-3, atol=1e-4)


def test_no_threshold_means_no_outliers():
    packed = quantize_matrix(*random_matrix(0), GPTQ)
    assert packed.outliers is None
    assert outlier_share(packed) == 0
    assert outlier_share(quantize_matrix(*random_matrix(0), SMALL)) > 0


def test_size_of_the_hessian_does_not_matter():
    weight, hessian = random_matrix(0)
    expected = quantize_matrix(weight, hessian, SMALL)
    for factor in (2.0**-20, 2.0**20):
        assert_equal(quantize_matrix(weight, factor * hessian, SMALL), expected)


def test_features_that_never_occur():
    weight, hessian = random_matrix(0)
    dead = [3, 17, 60]
    hessian[dead] = hessian[:, dead] = 0
    packed = quantize_matrix(weight, hessian, SMALL)
    approximation = DEQUANTIZE(packed)
    assert np.isfinite(approximation).all()
    assert weighted_loss(weight, approximation, hessian) < 0.1 * weighted_loss(weight, 0 * weight, hessian)
    changed = weight.copy()
    changed[:, dead] = 100
    assert_equal(quantize_matrix(changed, hessian, SMALL), packed)


def test_zero_rows_stay_zero():
    weight, hessian = random_matrix(0)
    weight[5] = 0
    np.testing.assert_array_equal(DEQUANTIZE(quantize_matrix(weight, hessian, SMALL))[5], 0)
    np.testing.assert_array_equal(DEQUANTIZE(quantize_matrix(0 * weight, hessian, SMALL)), 0)


def test_constant_rows_are_exact():
    weight, hessian = random_matrix(0)
    weight[5], weight[6] = 0.3, -7
    config = replace(SMALL, scale_bits=None, zero_bits=None, stats_dtype="float32")
    np.testing.assert_allclose(DEQUANTIZE(quantize_matrix(weight, hessian, config))[5:7], weight[5:7], rtol=1e-5)


@pytest.mark.slow
def test_matrices_that_share_an_input_are_solved_as_each_alone():
    first, hessian = random_matrix(0)
    second = 3 * random_matrix(1)[0][:16]
    packed, dense, finite = quantize_shared((first, second), hessian, SMALL)
    assert finite
    for together, values, weight in zip(packed, dense, (first, second), strict=True):
        alone = quantize_matrix(weight, hessian, SMALL)
        np.testing.assert_array_equal(weight_codes(together), weight_codes(alone))
        np.testing.assert_array_equal(outlier_mask(together), outlier_mask(alone))
        np.testing.assert_allclose(DEQUANTIZE(alone), values, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(DEQUANTIZE(trim(together)), values, rtol=1e-6, atol=1e-6)


def test_jitted_is_the_same_as_eager():
    weight, hessian = random_matrix(0)
    jitted = jax.jit(quantize_matrix, static_argnames="config")(weight, hessian, config=SMALL)
    assert jitted.outliers.values.size == weight.size
    assert_equal(trim(jitted), quantize_matrix(weight, hessian, SMALL))


def test_shrinkage_adds_a_share_of_each_diagonal_entry():
    _, hessian = random_matrix(0)
    config = replace(SMALL, damping=0.0)
    shrunk, added = factorize(hessian, config, 0.3), factorize(hessian + 0.3 * np.diag(np.diag(hessian)), config)
    np.testing.assert_allclose(shrunk.inverse_factor, added.inverse_factor, rtol=1e-3, atol=1e-5)
    assert np.abs(shrunk.inverse_factor - factorize(hessian, config).inverse_factor).max() > 0.01


def rank_deficient(hessian: np.ndarray) -> np.ndarray:
    return np.outer(hessian[0], hessian[0]) / hessian[0, 0]


def indefinite(hessian: np.ndarray) -> np.ndarray:
    return hessian - 0.2 * np.mean(np.diag(hessian)) * np.eye(len(hessian), dtype=np.float32)


@pytest.mark.parametrize("spoil", [rank_deficient, indefinite])
def test_a_hessian_that_cannot_be_factorized_is_damped_more(spoil):
    weight, hessian = random_matrix(0)
    hessian = spoil(hessian)
    packed = quantize_matrix(weight, hessian, replace(SMALL, damping=0.0))
    assert np.isfinite(DEQUANTIZE(packed)).all()
    assert weighted_loss(weight, DEQUANTIZE(packed), np.eye(64)) < 0.5 * weighted_loss(weight, 0, np.eye(64))


@pytest.mark.parametrize(("diagonal", "others"), [(np.nan, np.nan), (1, np.nan), (1, 1e4)])
def test_a_hessian_that_is_none_is_an_error(diagonal, others):
    hessian = np.full((64, 64), others, np.float32)
    np.fill_diagonal(hessian, diagonal)
    with pytest.raises(ValueError, match="cannot be factorized"):
        quantize_matrix(random_matrix(0)[0], hessian, SMALL)


def test_values_that_are_not_finite_are_counted():
    weight, hessian = random_matrix(0)
    weight[0, 0], weight[1, 1], weight[2, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match="weight has 3 values that are NaN or infinite"):
        quantize_matrix(weight, hessian, SMALL)


def test_weights_too_large_for_float16_are_an_error():
    weight, hessian = random_matrix(0)
    with pytest.raises(ValueError, match=r"weight has weights up to .* float16: scale it down to 16384"):
        quantize_matrix(weight * 1e6, hessian, SMALL)


@pytest.mark.parametrize(
    ("out", "columns", "message"),
    [
        (32, 70, "weight: 70 input features do not divide into groups of 16"),
        (24, 64, "weight: 24 output rows do not divide into statistics groups of 16"),
    ],
)
def test_sizes_that_do_not_divide(out, columns, message):
    with pytest.raises(ValueError, match=message):
        quantize_matrix(np.ones((out, columns), np.float32), None, SMALL)


# Whole rows as outliers


@pytest.mark.slow
def test_whole_rows_are_kept_and_no_other_weight() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 48)) * np.exp(rng.normal(size=(64, 1)))
    x = rng.normal(size=(300, 48))
    config = replace(SMALL, outlier_threshold=None, outlier_rows=0.1)
    packed = quantize_matrix(jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), config)
    mask = outlier_mask(packed)
    rows = mask.all(axis=1)
    assert rows.sum() == 6  # of 64, a tenth
    assert not mask[~rows].any()
    dense = np.asarray(DEQUANTIZE(packed))
    error = np.abs(dense - weight)
    assert error[rows].max() < 2e-3 * np.abs(weight).max()
    assert error[rows].max() < error[~rows].max()
    # Those whose errors would be large: here the rows of large weights.
    assert set(np.flatnonzero(rows)) <= set(np.argsort(-np.abs(weight).max(axis=1))[:12])


@pytest.mark.slow
def test_no_whole_rows_is_gptq() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(32, 48)), rng.normal(size=(300, 48))
    inputs = jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)
    none, gptq = (quantize_matrix(*inputs, config) for config in (replace(GPTQ, outlier_rows=0.0), GPTQ))
    np.testing.assert_array_equal(weight_codes(none), weight_codes(gptq))
