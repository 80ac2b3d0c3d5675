"""Sensitivities against a float64 reference, against the solver, and in a whole model."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, MODEL, tiny_params

from pallas_kernels import outlier_share, spqr_dequantize
from spqr_jax import SpqrConfig, quantize_matrix
from spqr_jax.analyze.sensitivity import Heads, matrix_heads, sensitivities, sensitivity
from spqr_jax.models import Falcon, FalconConfig, RotaryConfig
from spqr_jax.models.decoder import Decoder, make_context
from spqr_jax.storage.model_source import ModelSource

UNDAMPED = SpqrConfig(permutation="identity", damping=0.0)
PLAIN = SpqrConfig(scale_bits=None, zero_bits=None, stats_dtype="float32", simplified=True)
OUT, COLUMNS, TOKENS = 32, 48, 200


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (OUT, COLUMNS)).astype(np.float32)


@pytest.fixture(scope="module")
def hessian() -> np.ndarray:
    """Of correlated inputs of different sizes."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(TOKENS, COLUMNS)) @ rng.normal(size=(COLUMNS, COLUMNS)) * rng.uniform(0.2, 3, COLUMNS)
    return (x.T @ x).astype(np.float32)


def rounding_errors(weight: np.ndarray, config: SpqrConfig) -> np.ndarray:
    """w − ŵ in float64, columns in quantization order; scales and zeros not rounded."""
    groups = weight.astype(np.float64).reshape(len(weight), -1, config.group_size)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    scale = (high - low) / (2**config.bits - 1)
    codes = np.round((groups - low) / scale)
    return (groups - (low + scale * codes)).reshape(weight.shape)


def reference(weight: np.ndarray, hessian: np.ndarray, config: SpqrConfig) -> tuple[np.ndarray, float]:
    """Sensitivities and the share of outliers, in float64, with the inverse itself."""
    hessian = hessian.astype(np.float64)
    order = np.arange(len(hessian))
    if config.permutation == "act_order":
        order = np.argsort(-np.diag(hessian), kind="stable")
    errors = np.empty(weight.shape)
    errors[:, order] = rounding_errors(weight[:, order], config)
    diagonal = np.diag(hessian)
    damped = hessian + config.damping * diagonal.mean() * np.eye(len(hessian))
    values = errors**2 / (2 * np.diag(np.linalg.inv(damped)))
    # U_jj² is what is left of [H⁻¹]_jj when the features before j are given: one over the first pivot of the rest.
    remaining = [np.linalg.inv(damped[np.ix_(order[j:], order[j:])])[0, 0] for j in range(len(order))]
    variances = weight[:, order].astype(np.float64).var(axis=0, ddof=1)
    threshold = config.outlier_threshold * np.mean(variances / remaining)
    return values, float((errors[:, order] ** 2 / remaining > threshold).mean())


@pytest.mark.slow
@pytest.mark.parametrize("permutation", ["act_order", "identity"])
@pytest.mark.parametrize(("bits", "group_size", "threshold"), [(3, 16, 0.1), (4, 8, 0.01)])
def test_against_float64(weight, hessian, permutation, bits, group_size, threshold):
    config = replace(PLAIN, permutation=permutation, bits=bits, group_size=group_size, outlier_threshold=threshold)
    found = sensitivity(jnp.array(weight), jnp.array(hessian), config)
    values, share = reference(weight, hessian, config)
    np.testing.assert_allclose(found.values, values, rtol=1e-3, atol=1e-6 * values.max())
    assert 0 < share < 0.5
    assert float(found.outlier_share) == pytest.approx(share, abs=1e-6)


def test_with_the_identity_it_is_half_the_squared_error(weight):
    config = replace(PLAIN, damping=0.0)
    found = sensitivity(jnp.array(weight), jnp.eye(COLUMNS), config)
    np.testing.assert_allclose(found.values, rounding_errors(weight, config) ** 2 / 2, rtol=1e-3, atol=1e-9)


def test_it_is_half_the_least_error_that_other_weights_leave(weight, hessian):
    """The definition: the other weights of the row are solved for, in float64."""
    config = replace(PLAIN, damping=0.0, permutation="identity")
    row, column = 3, 7
    error = -rounding_errors(weight, config)[row, column]
    others = np.arange(COLUMNS) != column
    h = hessian.astype(np.float64)
    change = np.where(others, 0, error)
    change[others] = np.linalg.solve(h[np.ix_(others, others)], -error * h[others, column])
    found = sensitivity(jnp.array(weight), jnp.array(hessian), config)
    assert float(found.values[row, column]) == pytest.approx(change @ h @ change / 2, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stats", [None, 3])
def test_weights_are_rounded_as_the_solver_does_it(weight, stats):
    config = replace(UNDAMPED, scale_bits=stats, zero_bits=stats, outlier_threshold=None)
    errors = weight - spqr_dequantize(quantize_matrix(jnp.array(weight), None, config))
    found = sensitivity(jnp.array(weight), jnp.eye(COLUMNS), config)
    np.testing.assert_allclose(found.values, errors**2 / 2, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("simplified", [False, True])
def test_outliers_are_those_of_the_solver_where_nothing_is_corrected(weight, simplified):
    """With H = I there are no corrections."""
    config = replace(UNDAMPED, simplified=simplified, outlier_threshold=0.03)
    packed = quantize_matrix(jnp.array(weight), jnp.eye(COLUMNS), config)
    found = sensitivity(jnp.array(weight), jnp.eye(COLUMNS), config)
    assert float(found.outlier_share) == pytest.approx(float(outlier_share(packed)), abs=1e-6)
    assert 0.001 < found.outlier_share < 0.5


def test_a_multiple_of_the_hessian_multiplies_sensitivities_only(weight, hessian):
    once, twice = (sensitivity(jnp.array(weight), jnp.array(h), PLAIN) for h in (hessian, 2 * hessian))
    np.testing.assert_allclose(twice.values, 2 * once.values, rtol=1e-5)
    assert once.outlier_share == twice.outlier_share


def test_dead_features_have_none_and_no_threshold_no_outliers(weight, hessian):
    alive = np.ones(COLUMNS)
    alive[[2, 30]] = 0
    found = sensitivity(jnp.array(weight), jnp.array(hessian * np.outer(alive, alive)), PLAIN)
    np.testing.assert_array_equal(np.asarray(found.values).any(axis=0), alive.astype(bool))
    assert sensitivity(jnp.array(weight), jnp.array(hessian), replace(PLAIN, outlier_threshold=None)).outlier_share == 0


def test_a_bad_hessian_is_told(weight, hessian):
    with pytest.raises(ValueError, match="cannot be factorized"):
        sensitivity(jnp.array(weight), jnp.full((COLUMNS, COLUMNS), jnp.nan), PLAIN)
    with pytest.raises(ValueError, match="48 input features"):
        sensitivity(jnp.array(weight), jnp.array(hessian), replace(PLAIN, group_size=32))


# Whole models


def source_of(model: Decoder, params: dict[str, Any]) -> ModelSource:
    return ModelSource(model, {name: partial(params.__getitem__, name) for name in params}, None)


@pytest.mark.slow
def test_a_model_is_followed_as_it_is():
    """The Hessians here are those of a forward pass through the original blocks, each in one piece."""
    params = tiny_params(0)
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (4, 40))
    found = {matrix.name: matrix for matrix in sensitivities(source_of(MODEL, params), tokens, PLAIN)}
    assert len(found) == 14
    hidden = MODEL.apply({"params": params}, tokens, method="embed")
    context, _ = make_context(jnp.ones(tokens.shape, bool))
    for depth in range(CONFIG.num_layers):
        own = params[f"layers_{depth}"]
        block = MODEL.new_block()
        state = {"hidden": hidden}
        for stage in block.stages:
            state = block.apply({"params": own}, state, context, method=stage.method)
            for feed, names in stage.feeds.items():
                x = state[feed].reshape(-1, state[feed].shape[-1])
                for name in names:
                    expected = sensitivity(own[name]["kernel"].T, x.T @ x / len(x), PLAIN)
                    matrix = found[f"layers_{depth}.{name}"]
                    assert (matrix.kind, matrix.depth) == (name, depth)
                    largest = float(expected.values.max())
                    np.testing.assert_allclose(
                        matrix.sensitivity.values, expected.values, rtol=2e-2, atol=1e-4 * largest
                    )
        hidden = state["hidden"]


def test_heads_of_a_llama():
    assert matrix_heads(MODEL.new_block()) == {
        "q_proj": Heads(0, 8),
        "k_proj": Heads(0, 8),
        "v_proj": Heads(0, 8),
        "o_proj": Heads(1, 8),
    }


@pytest.mark.parametrize("arrangement", ["sequential", "parallel", "parallel_two_norms"])
def test_heads_of_a_falcon(arrangement):
    block = Falcon(FalconConfig(61, 32, 64, 1, 4, 2, arrangement, RotaryConfig())).new_block()
    assert matrix_heads(block) == {"query_key_value": Heads(0, 8), "dense": Heads(1, 8)}


def test_a_quantized_model_is_refused():
    packed = tiny_params(0)
    own = packed["layers_0"]["q_proj"]
    own["kernel"] = quantize_matrix(jnp.array(own["kernel"].T), None, PLAIN)
    with pytest.raises(ValueError, match=r"layers_0\.q_proj is quantized already"):
        next(sensitivities(source_of(MODEL, packed), np.zeros((4, 40), int), PLAIN))


@pytest.mark.slow
def test_a_falcon_is_followed_too():
    model = Falcon(FalconConfig(61, 32, 64, 2, 4, 2, "parallel", RotaryConfig()))
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    tokens = np.random.default_rng(3).integers(0, 61, (4, 40))
    found = list(sensitivities(source_of(model, params), tokens, PLAIN))
    kinds = ("query_key_value", "dense_h_to_4h", "dense", "dense_4h_to_h")
    assert [matrix.name for matrix in found] == [f"layers_{depth}.{kind}" for depth in range(2) for kind in kinds]
    assert all(matrix.sensitivity.values.max() > 0 for matrix in found)
