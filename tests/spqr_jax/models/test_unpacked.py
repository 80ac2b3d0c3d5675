"""Packed models unpacked once: the same predictions, in the forms that a CPU computes fastest."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import LOGITS, TOKENS, random_params
from helpers.trained_models import byte_tokens, trained

from pallas_kernels import SpqrError, SpqrTensor, spqr_dequantize
from spqr_jax import SpqrConfig, generate, perplexity, quantize
from spqr_jax.generation import Policy, decode, extend, for_decoding, start
from spqr_jax.measure.divergence import mean_divergence, window_divergences
from spqr_jax.models import Decoder, Falcon, FalconConfig, Llama, LlamaConfig, RotaryConfig, unpacked
from spqr_jax.models.row_major import MOST_COLUMNS, RowMajor, row_major_product
from spqr_jax.models.unpacked import for_measuring, form_of, unpacked_bytes, unpacks

SIZES = {"vocab_size": 61, "hidden_size": 64, "mlp_size": 96, "num_layers": 2, "num_heads": 4, "max_positions": 256}
LLAMA = partial(LlamaConfig, **SIZES, num_kv_heads=2, head_dim=16, rotary=RotaryConfig())
FALCON = partial(FalconConfig, **SIZES, num_kv_heads=2, rotary=RotaryConfig())
MODELS: dict[str, Decoder] = {
    "llama, tied, biases": Llama(LLAMA(tie_embeddings=True, attention_bias=True, mlp_bias=True)),
    "falcon, parallel, biases": Falcon(FALCON(arrangement="parallel", bias=True)),
    "falcon, two norms": Falcon(FALCON(arrangement="parallel_two_norms", tie_embeddings=False)),
}
# Rounding to float16, relative to the largest logit.
TOLERANCE = 2e-3


FAST = "llama, tied, biases"


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in MODELS]
)
def model(request: pytest.FixtureRequest) -> Decoder:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def params(model: Decoder) -> dict[str, Any]:
    return random_params(model)


def dequantized(params: Any) -> Any:
    def dense(leaf: Any) -> Any:
        return np.asarray(spqr_dequantize(leaf)).T if isinstance(leaf, SpqrTensor) else leaf

    return jax.tree.map(dense, params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


@pytest.mark.slow
def test_logits_are_those_of_the_packed_model(model: Decoder, params: dict[str, Any]) -> None:
    expected = LOGITS(model, params, TOKENS)
    assert_close(LOGITS(model, for_measuring(params), TOKENS), expected, 1e-5)
    form = for_decoding(model, params)
    assert_close(LOGITS(model, form, TOKENS), expected, TOLERANCE)
    assert_close(LOGITS(model, form, TOKENS[:1, :1]), LOGITS(model, params, TOKENS[:1, :1]), TOLERANCE)


@pytest.mark.slow
def test_dense_models_keep_their_values(model: Decoder, params: dict[str, Any]) -> None:
    plain = dequantized(params)
    expected = LOGITS(model, plain, TOKENS)
    assert_close(LOGITS(model, for_decoding(model, plain), TOKENS), expected, 1e-5)
    short = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), plain)
    form = for_decoding(model, short)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(form["blocks"]) if leaf.ndim == 3} == {"float16"}
    assert_close(LOGITS(model, form, TOKENS), LOGITS(model, short, TOKENS), 1e-5)


@pytest.mark.slow
def test_some_blocks_may_be_dense(model: Decoder, params: dict[str, Any]) -> None:
    partly = params | {"layers_1": dequantized(params["layers_1"])}
    expected = LOGITS(model, params, TOKENS)
    assert_close(LOGITS(model, for_decoding(model, partly), TOKENS), expected, TOLERANCE)
    assert_close(LOGITS(model, for_measuring(partly), TOKENS), expected, 1e-5)


def test_a_form_is_kept(model: Decoder, params: dict[str, Any]) -> None:
    for form in (for_decoding(model, params), for_decoding(model, params, "packed")):
        again = for_decoding(model, form)
        assert jax.tree.structure(again) == jax.tree.structure(form)
        assert form_of(again) == form_of(form)
        assert form_of(for_measuring(form)) == form_of(form)


@pytest.mark.slow
def test_a_trained_model_says_the_same() -> None:
    model, params = trained("llama")
    text = byte_tokens("test")
    config = SpqrConfig(bits=3, group_size=16)
    quantized, _ = quantize(params, byte_tokens("valid")[: 16 * 128].reshape(16, 128), model=model, config=config)
    prompts = [text[start : start + 20].tolist() for start in range(0, 160, 20)]
    packed = for_decoding(model, quantized, "packed")
    unpacked_once = for_decoding(model, quantized, "unpacked")
    for prompt in (prompts, prompts[:1], prompts[1:2]):
        written = [generate(model, form, prompt, max_new_tokens=24) for form in (packed, unpacked_once)]
        assert written[0] == written[1]
    windows = text[: 4 * 128].reshape(4, 128)
    exact, rounded = (
        mean_divergence(list(window_divergences(model, params, form, windows))).kl for form in (packed, unpacked_once)
    )
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert perplexity(model, quantized, text[:512], window=128) == pytest.approx(
        perplexity(model, packed, text[:512], window=128), rel=1e-5
    )


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("shape", [(37, 24), (700, 600), (8, MOST_COLUMNS + 5)])
def test_products_in_rows(rows: int, pieces: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal(shape, np.float32), rng.standard_normal((rows, shape[1]), np.float32)
    divisor = np.exp2(rng.integers(-3, 4, shape[1])).astype(np.float32)
    w = RowMajor((weight * divisor).astype(np.float16), divisor, pieces)
    exact = x.astype(np.float64) @ (np.asarray(w.weight, np.float64) / divisor).T
    assert_close(row_major_product(jnp.asarray(x), w), exact, 1e-5)


def test_products_in_rows_of_no_rows_and_of_many_axes() -> None:
    w = RowMajor(jnp.ones((3, 4), jnp.float16), jnp.ones(4))
    assert row_major_product(jnp.ones((2, 0, 4)), w).shape == (2, 0, 3)
    y = row_major_product(jnp.ones((2, 1, 4), jnp.bfloat16), w)
    assert (y.shape, y.dtype) == ((2, 1, 3), jnp.bfloat16)


@pytest.mark.slow
def test_float16_has_room_for_weights_of_any_size() -> None:
    """Weights whose columns are larger or smaller than float16's numbers by far."""
    model = MODELS[FAST]
    params = dequantized(random_params(model))
    sizes = np.exp2(np.linspace(-60, 60, 64)).astype(np.float32)[:, None]
    wide = jax.tree.map(lambda leaf: leaf, params)
    wide["layers_0"]["o_proj"]["kernel"] = np.asarray(params["layers_0"]["o_proj"]["kernel"] * sizes, jnp.bfloat16)
    (kernel,) = (for_decoding(model, wide)["blocks"]["o_proj"]["kernel"],)
    assert kernel.weight.dtype == jnp.float16 or kernel.weight.dtype == jnp.float32
    restored = np.asarray(kernel.weight[0], np.float32) / np.asarray(kernel.divisor[0])
    np.testing.assert_array_equal(restored.T, np.asarray(wide["layers_0"]["o_proj"]["kernel"], np.float32))


def test_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[FAST]
    params = random_params(model)
    assert form_of(for_decoding(model, params)).startswith("unpacked to float16")
    assert form_of(for_measuring(params)).startswith("unpacked to float32")
    needed = unpacked_bytes(params, 4)
    assert needed == sum(leaf.nbytes for leaf in jax.tree.leaves(dequantized(params)))
    monkeypatch.setattr(unpacked, "available_bytes", lambda: needed)
    assert not unpacks(params, "auto", 4)
    assert unpacks(params, "unpacked", 4)
    assert form_of(for_measuring(params)).startswith("packed")
    assert form_of(for_decoding(model, params, "packed")).startswith("packed")
    with pytest.raises(SpqrError, match="memory is 'full', but must be 'auto', 'packed' or 'unpacked'"):
        for_decoding(model, params, "full")


def test_a_step_copies_no_weights() -> None:
    """No instruction of the compiled loop over the tokens makes an array of the size of a matrix."""
    model = MODELS[FAST]
    form = for_decoding(model, random_params(model) | {"embed_tokens": {"embedding": np.ones((61, 64), np.float16)}})
    state, tokens, mask = start(model, form, [[1, 2, 3]], 8)
    state = jax.eval_shape(partial(extend, model, Policy()), form, state, tokens, mask)
    program = decode.lower(model, Policy(), form, state, 8).compile(
        compiler_options={"xla_backend_optimization_level": 2, "xla_backend_extra_options": ""}
    )
    # Fused computations make nothing in memory.
    text = re.sub(r"%fused_computation.*?\n}\n", "", program.as_text(), flags=re.DOTALL)
    made = re.findall(r"= (?:f16|f32)\[([\d,]+)\]\S* (?:fusion|copy|convert|transpose|dynamic-slice)\(", text)
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in made]
    assert sizes
    # The smallest matrix is that of the head.
    assert max(sizes) < 61 * 64
