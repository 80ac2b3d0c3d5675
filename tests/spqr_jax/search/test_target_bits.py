"""Thresholds for a target size: the measured size is the target, and impossible targets are refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, MODEL, tiny_params
from helpers.trained_models import MODELS, calibration_tokens, trained
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import SpqrTensor
from spqr_jax import NEAR_LOSSLESS, SpqrConfig, quantize, summarize
from spqr_jax.quantization.factorize import factorize
from spqr_jax.quantization.solver import quantize_matrix
from spqr_jax.search.target_bits import Curve, outlier_counts, outlier_curve, settings_for, threshold_for
from spqr_jax.storage.model_source import ModelSource

PARAMS = tiny_params(0)
SOURCE = ModelSource(MODEL, {name: lambda part=part: part for name, part in PARAMS.items()}, None)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 24)).astype(np.int32)
CURVE = Curve(3.6, (0.01, 0.1, 1.0), (0.3, 0.02, 0.001))


@given(st.floats(3.8, 12))
def test_threshold_gives_the_wanted_share(target: float) -> None:
    threshold = threshold_for(CURVE, target)
    assert 0.01 <= threshold <= 1.0
    assert threshold_for(CURVE, target, measured=(threshold, target)) == pytest.approx(threshold)
    # More was measured than the curve says: a larger threshold is needed.
    assert threshold_for(CURVE, target, measured=(threshold, target + 0.05)) > threshold


def test_threshold_is_that_of_the_curve_at_its_points() -> None:
    for threshold, share in zip(CURVE.thresholds, CURVE.shares, strict=True):
        assert threshold_for(CURVE, 3.6 + 32 * share) == pytest.approx(threshold)


@pytest.mark.parametrize("target", [3.5, 3.62, 14.0])
def test_a_size_that_outliers_cannot_give_is_told(target: float) -> None:
    with pytest.raises(ValueError, match=r"only 3\.63 to 13\.20"):
        threshold_for(CURVE, target)


@pytest.mark.slow
def test_a_matrix_has_as_many_outliers_as_are_counted() -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(32, 48)), rng.normal(size=(200, 48)) * np.exp(rng.normal(size=48))
    hessian = jnp.asarray(x.T @ x, jnp.float32)
    kernel = jnp.asarray(weight.T, jnp.float32)
    counts = outlier_counts((kernel,), factorize(hessian, SpqrConfig()), jnp.array([0.1, 0.5]), SpqrConfig())
    for threshold, count in zip((0.1, 0.5), counts, strict=True):
        packed = quantize_matrix(kernel.T, hessian, SpqrConfig(outlier_threshold=threshold))
        assert packed.outliers is not None
        assert int(packed.outliers.offsets[-1]) == int(count)


@pytest.mark.slow
def test_bits_without_outliers_are_those_of_the_packed_arrays() -> None:
    curve = outlier_curve(SOURCE, TOKENS, SpqrConfig())
    quantized, _ = quantize(PARAMS, TOKENS, model=MODEL, config=SpqrConfig())
    totals = summarize(quantized)
    expected = totals.bits_per_weight - 32 * totals.outlier_share
    assert curve.bits_without_outliers == pytest.approx(expected, rel=1e-6)
    assert list(curve.shares) == sorted(curve.shares, reverse=True)


@pytest.mark.slow
def test_the_size_is_met_after_one_correction() -> None:
    model, params = trained("falcon")
    source = ModelSource(model, {key: lambda part=part: part for key, part in params.items()}, None)
    tokens = calibration_tokens()[:32]
    curve = outlier_curve(source, tokens, SpqrConfig())
    target, measured = curve.bits_without_outliers + 0.6, None
    for _ in range(2):
        threshold = threshold_for(curve, target, measured)
        config = SpqrConfig(outlier_threshold=threshold)
        quantized, _ = quantize(params, tokens, model=model, config=config)
        measured = threshold, summarize(quantized).bits_per_weight
    assert measured is not None
    assert abs(measured[1] - target) < 0.02
    assert isinstance(quantized["layers_0"][model.new_block().matrices()[0]]["kernel"], SpqrTensor)


def test_settings_are_the_last_that_fit() -> None:
    """Groups of 64 do not divide 160 features; 4-bit codes in groups of 32 take 4.4 bits without outliers."""
    model = MODELS["falcon"]
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    source = ModelSource(model, {name: partial(params.__getitem__, name) for name in params}, None)
    groups_of_32 = SpqrConfig(group_size=32, stats_group_size=32, fit="error", embedding_bits=8)
    found = [settings_for(source, target) for target in (3.0, 3.9, 4.3, 4.6, 9.0)]
    assert found == [groups_of_32, groups_of_32, groups_of_32, NEAR_LOSSLESS, NEAR_LOSSLESS]
