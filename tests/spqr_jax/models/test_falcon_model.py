"""Falcons of each style in the library: cache, generation, stages, quantization, checkpoint and perplexity."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_falcon import STYLES, falcon_config, falcon_tensors
from helpers.tiny_models import write_checkpoint

from converters import Pretrained, from_pretrained
from pallas_kernels import SpqrTensor, spqr_dequantize
from spqr_jax import SpqrConfig, generate, load, perplexity, quantize, save
from spqr_jax.models import make_context
from spqr_jax.models.layers import Linear
from spqr_jax.models.stacked_blocks import stack_blocks

TOKENS = np.random.default_rng(1).integers(0, 96, (3, 24)).astype(np.int32)
MASK = np.arange(24) >= np.array([[0], [7], [15]])
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]]

LOGITS = jax.jit(
    lambda model, params, tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs), static_argnums=0
)


FAST = "40B"


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in STYLES]
)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Not tied, and of a seed with which greedy decoding does not soon repeat itself in any style.
    config = falcon_config(**{**STYLES[request.param], "tie_word_embeddings": False, "ffn_hidden_size": 64})
    return write_checkpoint(tmp_path_factory.mktemp("falcon"), config, falcon_tensors(config, seed=11))


@pytest.fixture(scope="module")
def falcon(directory: Any) -> Pretrained:
    return from_pretrained(directory)


@pytest.fixture(scope="module")
def quantized(falcon: Pretrained) -> tuple[dict[str, Any], dict[str, Any]]:
    return quantize(falcon.params, TOKENS, model=falcon.model, config=SpqrConfig())


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_cache_gives_the_logits_of_a_whole_pass(falcon: Pretrained, stacked: bool) -> None:
    model, params, _ = falcon
    params = stack_blocks(params) if stacked else params
    cache = model.init_cache(params, batch=3, slots=32)
    pieces = []
    for start, stop in ((0, 16), (16, 17), (17, 24)):
        mask = MASK[:, start:stop]
        logits, cache = LOGITS(model, params, TOKENS[:, start:stop], mask=mask, cache=cache)
        pieces.append(logits)
    expected = LOGITS(model, params, TOKENS, mask=MASK)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[MASK], expected[MASK], rtol=0, atol=1e-4)


def test_greedy_tokens_are_those_of_transformers(directory: Any, falcon: Pretrained) -> None:
    torch = pytest.importorskip("torch")
    from transformers import FalconForCausalLM

    reference = FalconForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    reference.generation_config.eos_token_id = None
    length = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    output = reference.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)
    expected = output[:, length:].tolist()
    assert all(len(set(tokens)) > 5 for tokens in expected), "the reference is too easy"
    assert generate(falcon.model, falcon.params, PROMPTS, max_new_tokens=20) == expected


def test_each_matrix_multiplies_what_its_stage_says(falcon: Pretrained) -> None:
    model, params, _ = falcon
    block = model.new_block()
    context, _ = make_context(jnp.asarray(MASK))
    state = {"hidden": model.apply({"params": params}, TOKENS, method="embed")}
    inputs: dict[str, jax.Array] = {}

    def record(following: Any, args: Any, kwargs: Any, where: Any) -> Any:
        if isinstance(where.module, Linear):
            inputs[where.module.name] = args[0]
        return following(*args, **kwargs)

    fed: dict[str, jax.Array] = {}
    for stage in block.stages:
        with nn.intercept_methods(record):
            state = block.apply({"params": params["layers_0"]}, state, context, method=stage.method)
        for feed, matrices in stage.feeds.items():
            fed |= dict.fromkeys(matrices, state[feed])
    assert set(state) == {"hidden"}
    assert inputs.keys() == fed.keys() == set(block.matrices())
    for matrix in inputs:
        np.testing.assert_array_equal(inputs[matrix], fed[matrix])


def test_what_restores_the_hidden_states_is_added_to_them_next(falcon: Pretrained) -> None:
    model, params, _ = falcon
    block, params = model.new_block(), params["layers_0"]
    context, _ = make_context(jnp.asarray(MASK))
    state = {"hidden": model.apply({"params": falcon.params}, TOKENS, method="embed")}
    restoring = []
    for stage, following in zip(block.stages, [*block.stages[1:], None], strict=True):
        state = block.apply({"params": params}, state, context, method=stage.method)
        if stage.restores:
            (matrix,) = stage.feeds[stage.restores]
            kernel = params[matrix]["kernel"]
            without = params | {matrix: params[matrix] | {"kernel": 0 * kernel}}
            new, old = (
                block.apply({"params": p}, state, context, method=following.method)["hidden"] for p in (params, without)
            )
            np.testing.assert_allclose(new - old, state[stage.restores] @ kernel, rtol=0, atol=1e-5)
            restoring.append(matrix)
    both = model.config.arrangement == "sequential"
    assert restoring == (["dense", "dense_4h_to_h"] if both else ["dense_4h_to_h"])


def test_inputs_that_are_the_same_are_one_feed(falcon: Pretrained) -> None:
    block = falcon.model.new_block()
    feeds = [names for stage in block.stages for names in stage.feeds.values()]
    shared = ("query_key_value", "dense_h_to_4h") in feeds
    assert shared == (falcon.model.config.arrangement == "parallel")
    assert len(feeds) == (3 if shared else 4)


@pytest.mark.slow
def test_packed_weights_give_the_logits_of_their_dequantized_values(falcon: Pretrained, quantized: Any) -> None:
    params, report = quantized
    names = {f"layers_{index}.{matrix}" for index in range(2) for matrix in falcon.model.new_block().matrices()}
    assert report.keys() == names
    assert all(0 < entry.relative_error < 0.2 for entry in report.values())
    packed, dense = LOGITS(falcon.model, params, TOKENS), LOGITS(falcon.model, unpacked(params), TOKENS)
    np.testing.assert_allclose(packed, dense, rtol=0, atol=1e-4)


@jax.jit
def unpacked(params: dict[str, Any]) -> dict[str, Any]:
    def dense(leaf: Any) -> Any:
        return spqr_dequantize(leaf).T if isinstance(leaf, SpqrTensor) else leaf

    return jax.tree.map(dense, params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))


@pytest.mark.slow
def test_checkpoint_gives_back_what_was_saved(falcon: Pretrained, quantized: Any, tmp_path: Any) -> None:
    params, _ = quantized
    save(tmp_path / "checkpoint", falcon.model, params)
    model, loaded, _ = load(tmp_path / "checkpoint")
    assert model == falcon.model
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.slow
def test_perplexity_is_that_of_the_logits(falcon: Pretrained, quantized: Any) -> None:
    params, _ = quantized
    logits = jax.nn.log_softmax(LOGITS(falcon.model, unpacked(params), TOKENS))
    losses = -np.take_along_axis(np.asarray(logits)[:, :-1], TOKENS[:, 1:, None], axis=-1)
    expected = np.exp(losses.mean())
    assert perplexity(falcon.model, params, TOKENS.ravel(), window=24) == pytest.approx(expected, rel=1e-4)
