"""Quantizing a whole tiny model: inputs, order, refit and reports, against the same in NumPy."""

import copy
import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.same import assert_identical
from helpers.sampling_noise import reference_sampling_noise

from pallas_kernels import SpqrTensor, bits_per_weight, outlier_share, spqr_dequantize, trim
from pallas_kernels.format.bit_layout import unpack_codes
from spqr_jax.config import SpqrConfig
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig, fuse_projections, make_context
from spqr_jax.quantization.model import quantize, quantize_blocks
from spqr_jax.quantization.solver import quantize_matrix

MODEL = Llama(
    LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        mlp_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary=RotaryConfig(),
        attention_bias=True,
        max_positions=64,
    )
)
BLOCK = MODEL.new_block()
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32)

FULL = SpqrConfig()
PLAIN = SpqrConfig(sequential=False, refit=False, simplified=True)
SEQUENTIAL = replace(PLAIN, sequential=True)


def random_params() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]

    def draw(leaf: Any) -> jax.Array:
        gain = 1.5 / np.sqrt(leaf.shape[0]) if leaf.ndim == 2 else 0.5
        return jnp.array(gain * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


PARAMS = random_params()


@functools.cache
def quantized_model(config: SpqrConfig, calibrated: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    return quantize(PARAMS, TOKENS if calibrated else None, model=MODEL, config=config)


def matrices(params: dict[str, Any]) -> dict[str, Any]:
    """Kernels of all blocks by the names that reports use."""
    return {
        f"layers_{index}.{matrix}": params[f"layers_{index}"][matrix]["kernel"]
        for index in range(MODEL.config.num_layers)
        for matrix in BLOCK.matrices()
    }


def codes_of(packed: SpqrTensor) -> np.ndarray:
    return np.asarray(unpack_codes(packed.codes, packed.in_features))


@jax.jit
def dequantize_padded(packed: SpqrTensor) -> jax.Array:
    return spqr_dequantize(packed)


def dense(packed: SpqrTensor) -> jax.Array:
    """`dequantize`, compiled once for each shape and not for each number of outliers."""
    if packed.outliers is None:
        return dequantize_padded(packed)
    return dequantize_padded(replace(packed, outliers=packed.outliers.pad(packed.shape[0] * packed.shape[1])))


def dense_block(params: dict[str, Any]) -> dict[str, Any]:
    """A quantized block's parameters with dense kernels."""
    return params | {name: params[name] | {"kernel": dense(params[name]["kernel"]).T} for name in BLOCK.matrices()}


def rest_of(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters without the kernels that are quantized."""
    rest = copy.deepcopy(params)
    for index in range(MODEL.config.num_layers):
        for matrix in BLOCK.matrices():
            del rest[f"layers_{index}"][matrix]["kernel"]
    return rest


@jax.jit
def run_block(
    params: dict[str, Any], hidden: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """A block's output, the input of each of its matrices, and the hidden states to which two of these add."""
    context, _ = make_context(jnp.ones(hidden.shape[:2], bool))
    state, inputs, added_to = {"hidden": hidden}, {}, {}
    for stage in BLOCK.stages:
        state = BLOCK.apply({"params": params}, state, context, method=stage.method)
        for feed, names in stage.feeds.items():
            inputs |= dict.fromkeys(names, state[feed])
            added_to |= {name: state["hidden"] for name in names if name in ("o_proj", "down_proj")}
    return state["hidden"], inputs, added_to


def embedded() -> jax.Array:
    return MODEL.apply({"params": PARAMS}, TOKENS, method="embed")


def flat(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def expected_errors(quantized: dict[str, Any], config: SpqrConfig) -> dict[str, float]:
    """‖(W − Ŵ) X‖² / ‖W X‖² of each matrix in float64, from running the blocks, original and quantized."""
    errors = {}
    hidden = original = embedded()
    for index in range(MODEL.config.num_layers):
        name = f"layers_{index}"
        solved = dense_block(quantized[name])
        # In sequence, a matrix sees what the quantized matrices before it in the block make.
        _, inputs, added_to = run_block(solved if config.sequential else PARAMS[name], hidden)
        original, original_inputs, originally_added_to = run_block(PARAMS[name], original)
        for matrix in BLOCK.matrices():
            x, x0 = flat(inputs[matrix]), flat(original_inputs[matrix])
            weight = np.asarray(PARAMS[name][matrix]["kernel"], np.float64).T
            if config.refit and config.sequential:
                target = x0 @ weight.T
                if matrix in added_to:
                    target += flat(originally_added_to[matrix]) - flat(added_to[matrix])
                hessian = x.T @ x
                shrinkage = config.shrinkage * reference_sampling_noise(inputs[matrix])
                held = np.diag(0.1 * np.diag(hessian).mean() + shrinkage * np.diag(hessian))
                weight = np.linalg.solve(hessian + held, x.T @ target + held @ weight.T).T
            error = weight - np.asarray(solved[matrix]["kernel"], np.float64).T
            errors[f"{name}.{matrix}"] = ((x @ error.T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
        hidden, _, _ = run_block(solved, hidden)
    return errors


SLOW = pytest.mark.slow
CONFIGS = [
    pytest.param(FULL, id="full"),
    pytest.param(PLAIN, id="plain", marks=SLOW),
    pytest.param(SEQUENTIAL, id="sequential", marks=SLOW),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_reported_errors_are_those_on_the_inputs_that_a_matrix_will_get(config):
    quantized, report = quantized_model(config)
    expected = expected_errors(quantized, config)
    assert list(report) == list(expected) == list(matrices(PARAMS))
    for name, error in expected.items():
        assert report[name].relative_error == pytest.approx(error, rel=1e-3), name
        assert 1e-4 < error < 0.2, name


@pytest.mark.parametrize("config", CONFIGS)
def test_report_agrees_with_the_tensors(config):
    quantized, report = quantized_model(config)
    for name, packed in matrices(quantized).items():
        assert isinstance(packed, SpqrTensor)
        assert packed.shape == matrices(PARAMS)[name].shape[::-1]
        assert report[name].bits_per_weight == bits_per_weight(packed)
        assert report[name].outlier_share == pytest.approx(float(outlier_share(packed)))
        assert report[name].seconds > 0
    assert any(matrix.outlier_share > 0 for matrix in report.values()) == (config.outlier_threshold is not None)


@pytest.mark.slow
def test_round_to_nearest_needs_no_calibration():
    quantized, report = quantized_model(PLAIN, calibrated=False)
    for name, packed in matrices(quantized).items():
        weight = np.asarray(matrices(PARAMS)[name], np.float64).T
        expected = ((weight - np.asarray(dense(packed))) ** 2).sum() / (weight**2).sum()
        assert report[name].relative_error == pytest.approx(expected, rel=1e-4)
    alone = quantize_matrix(PARAMS["layers_1"]["q_proj"]["kernel"].T, None, PLAIN)
    jax.tree.map(np.testing.assert_array_equal, quantized["layers_1"]["q_proj"]["kernel"], alone)


@pytest.mark.parametrize(
    ("config", "calibrated"),
    [
        pytest.param(PLAIN, True, id="plain", marks=SLOW),
        pytest.param(FULL, True, id="full", marks=SLOW),
        pytest.param(PLAIN, False, id="round-to-nearest", marks=SLOW),
    ],
)
def test_the_whole_can_be_jitted(config, calibrated):
    expected, report = quantized_model(config, calibrated)
    jitted = jax.jit(functools.partial(quantize, model=MODEL, config=config))
    quantized, jitted_report = jitted(PARAMS, TOKENS if calibrated else None)
    # Fused otherwise, sums are rounded otherwise. Where the refit follows what earlier blocks made of them, a code that
    # goes the other way moves later ones.
    exact = config is not FULL
    for name, packed in matrices(quantized).items():
        wanted, reported = matrices(expected)[name], report[name]
        if exact:
            np.testing.assert_array_equal(codes_of(packed), codes_of(wanted), err_msg=name)
            assert jax.tree.map(jnp.shape, trim(packed)) == jax.tree.map(jnp.shape, wanted)
        assert jitted_report[name].relative_error == pytest.approx(reported.relative_error, rel=1e-3 if exact else 0.1)
        assert jitted_report[name].outlier_share == pytest.approx(reported.outlier_share, rel=1e-6 if exact else 0.25)
        assert np.isnan(jitted_report[name].seconds)
    jax.tree.map(np.testing.assert_array_equal, rest_of(quantized), rest_of(expected))


@pytest.mark.slow
def test_first_matrix_is_solved_on_the_hessian_of_its_inputs():
    quantized, _ = quantized_model(replace(PLAIN, shrinkage=0.0))
    x = flat(run_block(PARAMS["layers_0"], embedded())[1]["q_proj"])
    alone = quantize_matrix(PARAMS["layers_0"]["q_proj"]["kernel"].T, (x.T @ x).astype(np.float32), PLAIN)
    packed = quantized["layers_0"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(packed.permutation, alone.permutation)
    np.testing.assert_array_equal(codes_of(packed), codes_of(alone))
    np.testing.assert_allclose(dense(packed), dense(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_in_sequence_the_inputs_differ_from_the_second_stage_on():
    apart, sequential = (matrices(quantized_model(config)[0]) for config in (PLAIN, SEQUENTIAL))
    for name in apart:
        same = (codes_of(apart[name]) == codes_of(sequential[name])).all()
        assert same == (name in ("layers_0.q_proj", "layers_0.k_proj", "layers_0.v_proj")), name


@pytest.mark.slow
def test_everything_else_stays_as_it_is():
    before = jax.tree.map(np.array, PARAMS)
    structure = jax.tree.structure(PARAMS)
    quantized, _ = quantize(PARAMS, TOKENS, model=MODEL, config=PLAIN)
    assert jax.tree.structure(PARAMS) == structure
    jax.tree.map(np.testing.assert_array_equal, PARAMS, before)
    assert jax.tree.structure(rest_of(quantized)) == jax.tree.structure(rest_of(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, rest_of(quantized), rest_of(PARAMS))
    assert "bias" in quantized["layers_1"]["q_proj"]


@pytest.mark.slow
def test_hidden_states_of_a_float16_model_may_be_larger_than_float16():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)
    for layer in ("layers_0", "layers_1"):
        params[layer]["o_proj"]["bias"] = jnp.full(64, 60000, jnp.float16)
    _, report = quantize(params, TOKENS, model=MODEL.clone(dtype=jnp.float16), config=PLAIN)
    assert all(0 < matrix.relative_error < 0.2 for matrix in report.values())


@pytest.mark.slow
def test_a_float16_model_is_followed_as_a_float32_model_is():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)
    _, report = quantize(params, TOKENS, model=MODEL.clone(dtype=jnp.float16), config=SEQUENTIAL)
    for name, expected in quantized_model(SEQUENTIAL)[1].items():
        assert report[name].relative_error == pytest.approx(expected.relative_error, rel=0.1), name


def changed(**kernels: Any) -> dict[str, Any]:
    """The parameters with other kernels in the second block."""
    params = copy.deepcopy(PARAMS)
    for matrix, kernel in kernels.items():
        params["layers_1"][matrix]["kernel"] = kernel
    return params


def kernel_of(matrix: str) -> jax.Array:
    return PARAMS["layers_1"][matrix]["kernel"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.where(TOKENS > 200, 256, TOKENS), "token id 256 is outside the vocabulary of 256"),
        (np.where(TOKENS > 200, -1, TOKENS), "token id -1 is outside the vocabulary of 256"),
        (TOKENS[:1, :11], "11 calibration tokens are too few for matrices with 96 input features"),
        (TOKENS.reshape(1, -1), "sequences have 128 tokens, but the model takes 64"),
        (TOKENS[0], r"shape \[sequences, tokens\], not \(32,\)"),
        (TOKENS + 0.7, "token ids are integers, but these have type float64"),
        (TOKENS > 9, "token ids are integers, but these have type bool"),
        (TOKENS.astype(np.int64) + 2**32, "exceeds 32 bits"),
        ([[1, 2.5], [3]], "token ids are integers, but these have type float64"),
        (["The sky"], "a text is given, but no tokenizer"),
    ],
)
def test_unusable_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        quantize(PARAMS, tokens, model=MODEL, config=PLAIN)


@pytest.mark.slow
def test_texts_and_lists_of_unequal_length_are_packed():
    text = "The sky is blue, and the sea is green. " * 6
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    packed = np.array(ids[: 3 * 64]).reshape(3, 64)
    expected = next(quantize_blocks(PARAMS, packed, model=MODEL, config=PLAIN)).params
    for texts in (text, [text], [ids[:9], ids[9:100], ids[100:]]):
        found = next(quantize_blocks(PARAMS, texts, model=MODEL, config=PLAIN, tokenizer=tokenizer))
        assert_identical(found.params, expected)


@pytest.mark.parametrize(
    ("params", "config", "message"),
    [
        (
            changed(v_proj=kernel_of("v_proj").at[0, :2].set(jnp.nan)),
            PLAIN,
            r"layers_1\.v_proj has 2 values that are NaN or infinite",
        ),
        (
            changed(down_proj=kernel_of("down_proj")[:, :40]),
            PLAIN,
            r"layers_1\.down_proj: 40 output rows do not divide into statistics groups of 16",
        ),
        (
            PARAMS,
            replace(PLAIN, group_size=128),
            r"layers_0\.\w+_proj: \d+ input features do not divide into groups of 128",
        ),
        (PARAMS, replace(PLAIN, stats_group_size=64), r"layers_0\.\w+_proj: \d+ output rows .* groups of 64"),
    ],
)
def test_unusable_weights_are_named(params, config, message):
    with pytest.raises(ValueError, match=message):
        quantize(params, TOKENS, model=MODEL, config=config)


def test_quantized_weights_are_not_quantized_again():
    with pytest.raises(ValueError, match=r"layers_0\.\w+_proj is quantized already"):
        quantize(quantized_model(PLAIN)[0], TOKENS, model=MODEL, config=PLAIN)


def test_inputs_that_overflow_are_named():
    params = copy.deepcopy(PARAMS)
    params["layers_1"]["post_attention_layernorm"]["scale"] = jnp.full(64, 3e37)
    with pytest.raises(ValueError, match="layers_1: the Hessian of the input of gate_proj, up_proj cannot be factor"):
        quantize(params, TOKENS, model=MODEL, config=PLAIN)


def test_outputs_that_overflow_are_named():
    model = Llama(replace(MODEL.config, mlp_bias=True))
    params = copy.deepcopy(PARAMS)
    for layer in ("layers_0", "layers_1"):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            size = params[layer][matrix]["kernel"].shape[1]
            params[layer][matrix]["bias"] = jnp.full(size, 3e38 if matrix == "down_proj" else 0.0)
    with pytest.raises(ValueError, match="layers_1: its output has values that are NaN or infinite"):
        quantize(params, TOKENS, model=model, config=PLAIN)


@pytest.mark.slow
def test_refit_needs_the_sequential_order():
    """Without it, each matrix of a block would make up for the same drift once more."""
    plain, _ = quantized_model(PLAIN)
    refitted, _ = quantized_model(replace(PLAIN, refit=True))
    for name, packed in matrices(plain).items():
        np.testing.assert_array_equal(codes_of(packed), codes_of(matrices(refitted)[name]))


@pytest.mark.slow
def test_matrices_of_one_input_are_quantized_so_that_they_can_be_fused():
    quantized, _ = quantized_model(FULL)
    fused = fuse_projections(quantized, MODEL)
    for index in range(2):
        block = fused[f"layers_{index}"]
        assert {"q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"} < block.keys()
        assert block["q_proj+k_proj+v_proj"]["kernel"].shape == (64 + 2 * 32, 64)
    forward = jax.jit(lambda params: MODEL.apply({"params": params}, TOKENS))
    np.testing.assert_allclose(forward(fused), forward(quantized), rtol=1e-5, atol=1e-4)
