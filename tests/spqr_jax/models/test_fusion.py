"""Matrices of one input as one: the same model, in fewer products."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import LOGITS, TOKENS, random_params
from helpers.same import assert_equal

from converters import ConversionError, export_hf_spqr, export_huggingface
from pallas_kernels import SpqrTensor
from spqr_jax import SpqrConfig, generate, load, perplexity, quantize, save
from spqr_jax.generation import for_decoding
from spqr_jax.models import (
    Decoder,
    Falcon,
    FalconConfig,
    Llama,
    LlamaConfig,
    RotaryConfig,
    fuse_projections,
    layers,
    make_context,
)
from spqr_jax.models.stacked_blocks import stack_blocks, unstack_blocks

SIZES = {"vocab_size": 61, "hidden_size": 64, "mlp_size": 96, "num_layers": 2, "num_heads": 4, "max_positions": 256}
LLAMA = partial(LlamaConfig, **SIZES, head_dim=16, rotary=RotaryConfig())
FALCON = partial(FalconConfig, **SIZES, rotary=RotaryConfig(), tie_embeddings=False)
MODELS: dict[str, Decoder] = {
    "llama": Llama(LLAMA(num_kv_heads=4)),
    "llama, grouped queries and biases": Llama(LLAMA(num_kv_heads=2, attention_bias=True, mlp_bias=True)),
    "falcon, parallel": Falcon(FALCON(num_kv_heads=1, arrangement="parallel")),
    "falcon, parallel, grouped queries and biases": Falcon(FALCON(num_kv_heads=2, arrangement="parallel", bias=True)),
}
APART = {
    "two norms": Falcon(FALCON(num_kv_heads=2, arrangement="parallel_two_norms")),
    "sequential": Falcon(FALCON(num_kv_heads=4, arrangement="sequential", alibi=True, bias=True)),
}


SLOW = ("llama", "falcon, parallel")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def model(request: pytest.FixtureRequest) -> Decoder:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def params(model: Decoder) -> dict[str, Any]:
    # Of each family, one model has outliers.
    return random_params(model, share=None if model.config.num_kv_heads == 2 else 0.02)


def packed_leaves(params: Any) -> list[SpqrTensor]:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))
    return [leaf for leaf in leaves if isinstance(leaf, SpqrTensor)]


def greedy(model: Decoder, params: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the cache, with the parameters in the form that they are given in."""
    cache = model.init_cache(params, batch=1, slots=len(prompt) + count)
    chosen: list[int] = []
    following = prompt
    for _ in range(count):
        logits, cache = LOGITS(model, params, np.array([following], np.int32), cache=cache)
        chosen.append(int(logits[0, -1].argmax()))
        following = chosen[-1:]
    return chosen


@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits_are_the_same(model: Decoder, params: Any, stacked: bool) -> None:
    params = stack_blocks(params) if stacked else params
    fused = fuse_projections(params, model)
    assert len(packed_leaves(fused)) < len(packed_leaves(params))
    expected = LOGITS(model, params, TOKENS)
    np.testing.assert_allclose(LOGITS(model, fused, TOKENS), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_fusing_and_stacking_go_in_either_order(model: Decoder, params: Any) -> None:
    fused = fuse_projections(params, model)
    stacked = stack_blocks(fused)
    assert_equal(fuse_projections(stack_blocks(params), model), stacked)
    assert_equal(unstack_blocks(stacked), fused)


def test_fusing_twice_changes_nothing(model: Decoder, params: Any) -> None:
    fused = fuse_projections(params, model)
    assert_equal(fuse_projections(fused, model), fused)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "falcon, parallel, grouped queries and biases"])
def test_generation_and_perplexity_are_the_same(name: str) -> None:
    model, prompt = MODELS[name], TOKENS[0].tolist()
    params = random_params(model)
    fused = fuse_projections(params, model)
    expected = greedy(model, stack_blocks(params), prompt, 12)
    assert len(set(expected)) > 2, "the parameters are too easy"
    for form in (params, fused, stack_blocks(params), stack_blocks(fused)):
        assert generate(model, form, [prompt], max_new_tokens=12) == [expected]
    text = TOKENS.ravel()
    assert perplexity(model, fused, text, window=12) == pytest.approx(perplexity(model, params, text, window=12))


@pytest.mark.parametrize(("name", "products"), [("llama", 4), ("falcon, parallel", 3)])
@pytest.mark.slow
def test_a_decode_step_takes_one_product_per_input(name: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]
    params = random_params(model)
    block = fuse_projections(params, model)["layers_0"]
    assert len(packed_leaves(block)) == products
    multiplied: list[SpqrTensor] = []

    def count(x: jax.Array, w: SpqrTensor) -> jax.Array:
        multiplied.append(w)
        return jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype)

    monkeypatch.setattr(layers, "spqr_matmul", count)
    cache = model.init_cache(params, batch=1, slots=8)
    context, _ = make_context(jnp.ones((1, 1), bool), cache)
    state = {"hidden": jnp.zeros((1, 1, 64)), **cache.blocks[0]}
    after = model.new_block().apply({"params": block}, state, context)
    assert set(after) == {"hidden", "keys", "values"}
    assert len(multiplied) == products


def test_one_generated_token_uses_the_fused_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Llama(LLAMA(num_kv_heads=1))
    products = 0

    def count(x: jax.Array, w: SpqrTensor) -> jax.Array:
        nonlocal products
        products += 1
        return jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype)

    params = random_params(model)
    monkeypatch.setattr(layers, "spqr_matmul", count)
    generate(model, for_decoding(model, params, "packed"), [[1]], max_new_tokens=1)
    # One program, whose scan over the blocks may be traced more than once.
    assert products % 4 == 0 < products
    assert products % 7


@pytest.mark.parametrize("name", APART)
def test_matrices_with_an_input_each_stay_as_they_are(name: str) -> None:
    model = APART[name]
    params = random_params(model)
    assert_equal(fuse_projections(params, model), params)


def test_matrices_that_cannot_be_joined_stay_as_they_are() -> None:
    model = MODELS["llama"]
    params = random_params(model, one_permutation=False)
    assert_equal(fuse_projections(params, model), params)
    stacked = stack_blocks(params)
    assert_equal(fuse_projections(stacked, model), stacked)


def test_dense_matrices_stay_as_they_are() -> None:
    model = MODELS["llama"]
    params = model.init(jax.random.key(0), TOKENS)["params"]
    assert_equal(fuse_projections(params, model), params)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["dense", "permuted", "biased"])
def test_each_block_is_fused_as_far_as_it_can_be(change: str) -> None:
    """Where one block's q, k and v cannot be joined, its gate and up are, and all of the other's."""
    model = MODELS["llama"]
    params = random_params(model)
    block = params["layers_1"]
    if change == "biased":
        block["k_proj"]["bias"] = np.zeros(64, np.float32)
    else:
        other = random_params(model, one_permutation=False)["layers_1"]["k_proj"]["kernel"]
        block["k_proj"]["kernel"] = other if change == "permuted" else np.zeros((64, 64), np.float32)
    fused = fuse_projections(params, model)
    assert {"q_proj", "k_proj", "v_proj", "gate_proj+up_proj"} <= fused["layers_1"].keys()
    assert {"q_proj+k_proj+v_proj", "gate_proj+up_proj"} <= fused["layers_0"].keys()
    for name in ("layers_0", "layers_1"):
        assert not {"gate_proj", "up_proj"} & fused[name].keys()
    np.testing.assert_allclose(LOGITS(model, fused, TOKENS), LOGITS(model, params, TOKENS), rtol=1e-5, atol=1e-4)


def test_a_fused_model_is_not_quantized_again(model: Decoder, params: Any) -> None:
    with pytest.raises(ValueError, match=r"layers_0\..* is quantized already: start from the original weights"):
        quantize(fuse_projections(params, model), TOKENS, model=model, config=SpqrConfig())


def test_a_fused_model_is_saved_as_it_is(model: Decoder, params: Any, tmp_path: Any) -> None:
    fused = fuse_projections(params, model)
    save(tmp_path / "fused", model, stack_blocks(fused))
    loaded_model, loaded, _ = load(tmp_path / "fused")
    assert loaded_model == model
    assert_equal(loaded, fused)


@pytest.mark.parametrize("export", [export_huggingface, export_hf_spqr])
def test_a_fused_model_is_not_exported(export: Any, tmp_path: Any) -> None:
    model = MODELS["llama"]
    fused = fuse_projections(random_params(model), model)
    with pytest.raises(ConversionError, match=r"layers_0\..*_proj\.kernel is missing; where projections are fused"):
        export(tmp_path / "exported", model, fused)
    assert not list(tmp_path.iterdir())
