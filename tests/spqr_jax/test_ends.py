"""A packed embedding and head: the logits, texts and files of the dense ones that they stand for."""

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import LOGITS, dense_params

from converters import export_hf_spqr, export_huggingface, from_pretrained
from pallas_kernels import SpqrTensor, spqr_dequantize
from spqr_jax import (
    SpqrConfig,
    generate,
    load,
    perplexity,
    quantize,
    quantize_checkpoint,
    save,
    shard_params,
    summarize,
)
from spqr_jax.generation import for_decoding
from spqr_jax.models import Llama, LlamaConfig, Opt, OptConfig, RotaryConfig
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.stacked_blocks import stack_blocks
from spqr_jax.models.unpacked import for_measuring, in_rows
from spqr_jax.quantization.report import relative_error
from spqr_jax.rules import Plan
from spqr_jax.storage.checkpoint import describe
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import read_record

VOCABULARY = 61
"""No multiple of the format's rows."""

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 32))
CONFIG = SpqrConfig(bits=4, group_size=16, outlier_threshold=0.5, embedding_bits=5)
MODELS: dict[str, Decoder] = {
    "tied": Llama(LlamaConfig(VOCABULARY, 64, 128, 2, 4, 2, 16, RotaryConfig(), tie_embeddings=True)),
    "untied": Llama(LlamaConfig(VOCABULARY, 64, 128, 2, 4, 2, 16, RotaryConfig())),
    "projected": Opt(OptConfig(VOCABULARY, 64, 128, 2, 4, 32, max_positions=128, tie_embeddings=True)),
}


@cache
def random_params(name: str) -> Params:
    return dense_params(MODELS[name])


@cache
def packed(name: str) -> Params:
    return quantize(random_params(name), TOKENS, model=MODELS[name], config=CONFIG)[0]


def dense(params: Params) -> Params:
    """The parameters that packed ones stand for."""

    def unpack(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, SpqrTensor):
            return leaf
        weight = np.asarray(spqr_dequantize(leaf))
        if path[-1].key == "embedding":
            return weight[:VOCABULARY]
        return weight[:VOCABULARY].T if path[0].key == "lm_head" else weight.T

    return jax.tree_util.tree_map_with_path(unpack, params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_embedding_and_head_are_packed_with_their_own_bits(name):
    params = packed(name)
    table = params["embed_tokens"]["embedding"]
    assert (table.bits, table.shape[0] % 16) == (5, 0)
    assert params["layers_0"]["v_proj"]["kernel"].bits == 4
    assert ("lm_head" in params) == (name == "untied")
    if name == "untied":
        assert params["lm_head"]["kernel"].bits == 5
    original = random_params(name)["embed_tokens"]["embedding"]
    error = dense(params)["embed_tokens"]["embedding"] - original
    assert np.square(error).mean() < 0.005 * np.square(original).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_forms_give_the_logits_of_the_dense_weights(name):
    model, params = MODELS[name], packed(name)
    expected = LOGITS(model, dense(params), TOKENS)
    assert expected.shape[-1] == VOCABULARY
    forms = {
        "packed": params,
        "stacked": stack_blocks(params),
        "measured": for_measuring(params, "unpacked"),
        "measured, packed": for_measuring(params, "packed"),
        "in rows": in_rows(params, model),
    }
    for form, found in forms.items():
        atol = (2e-3 if form == "in rows" else 1e-5) * np.abs(expected).max()
        np.testing.assert_allclose(LOGITS(model, found, TOKENS), expected, rtol=0, atol=atol, err_msg=form)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["packed", "unpacked"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_and_perplexity_are_those_of_the_dense_weights(name, memory):
    model, params = MODELS[name], packed(name)
    prompts = [[3, 1, 4], [1, 5, 9, 2]]
    expected = generate(model, dense(params), prompts, max_new_tokens=4)
    assert generate(model, for_decoding(model, params, memory), prompts, max_new_tokens=4) == expected
    text = np.tile(TOKENS.reshape(-1), 2)
    found = perplexity(model, for_measuring(params, memory), text, window=32)
    assert found == pytest.approx(perplexity(model, dense(params), text, window=32), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_head_is_solved_for_the_final_hidden_states(name):
    """At few bits, its error on these is smaller than that of rounding to nearest."""
    model, params = MODELS[name], random_params(name)
    config = dataclasses.replace(CONFIG, embedding_bits=2, outlier_threshold=None, refit=False)
    head = "embed_tokens" if name == "tied" else "lm_head"
    blocks = quantize(params, TOKENS, model=model, config=dataclasses.replace(config, embedding_bits=None))[0]
    x, _ = model.apply({"params": blocks}, TOKENS, method="hidden_states")
    x = x.reshape(-1, x.shape[-1])
    errors = []
    for tokens in (TOKENS, None):
        (kernel,) = quantize(params, tokens, model=model, config=config)[0][head].values()
        leaf = params[head]["embedding"] if name == "tied" else params[head]["kernel"].T
        errors.append(relative_error(jnp.asarray(leaf), spqr_dequantize(kernel)[:VOCABULARY], x.T @ x))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
def test_an_embedding_beside_a_head_is_rounded_to_nearest():
    config = dataclasses.replace(CONFIG, embedding_bits=3)
    calibrated, rounded = (
        quantize(random_params("untied"), tokens, model=MODELS["untied"], config=config)[0] for tokens in (TOKENS, None)
    )
    jax.tree.map(np.testing.assert_array_equal, calibrated["embed_tokens"], rounded["embed_tokens"])


@pytest.mark.slow
def test_traced_whole():
    model = MODELS["tied"]
    traced = jax.jit(lambda params: quantize(params, TOKENS, model=model, config=CONFIG)[0])(random_params("tied"))
    found, expected = (dense(params)["embed_tokens"]["embedding"] for params in (traced, packed("tied")))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_saved_loaded_and_exported(name, tmp_path: Path):
    model, params = MODELS[name], packed(name)
    save(tmp_path / "packed", model, params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "packed")[1], params)
    assert describe(tmp_path / "packed")["matrices"]["embed_tokens.embedding"]["bits"] == 5
    export_huggingface(tmp_path / "export", model, params)
    exported = from_pretrained(tmp_path / "export")
    expected = LOGITS(model, dense(params), TOKENS)
    np.testing.assert_allclose(LOGITS(exported.model, exported.params, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_official_format_has_them_dense(name, tmp_path: Path):
    model = MODELS[name]
    params, _ = quantize(random_params(name), TOKENS, model=model, config=SpqrConfig(embedding_bits=8))
    export_hf_spqr(tmp_path / "official", model, params)
    found = from_pretrained(tmp_path / "official")
    assert isinstance(found.params["layers_0"]["q_proj"]["kernel"], SpqrTensor)
    expected = LOGITS(model, dense(params), TOKENS)
    np.testing.assert_allclose(
        LOGITS(found.model, found.params, TOKENS), expected, rtol=0, atol=5e-3 * np.abs(expected).max()
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", MODELS)
def test_a_run_from_disk_to_disk_resumes_before_each_of_them(name, tmp_path: Path):
    model, params = MODELS[name], random_params(name)
    source = ModelSource(model, {part: partial(params.__getitem__, part) for part in params}, None, "random")
    parts = model.config.num_layers + (2 if name == "untied" else 1)
    finished: list[int] = []

    def stop(report: Any) -> None:
        finished.append(report.number)
        raise Interrupted

    for _ in range(parts):
        with pytest.raises(Interrupted):
            quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG, on_block=stop)
    assert finished == list(range(1, parts + 1))
    reports = quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG)
    assert "embed_tokens" in reports[model.config.num_layers].matrices
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], packed(name))
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.config == CONFIG


@pytest.mark.slow
def test_rules_name_them():
    rules: Any = [("lm_head", None), ("embed_tokens", {"bits": 8, "outlier_threshold": None})]
    model = MODELS["untied"]
    params, report = quantize(random_params("untied"), None, model=model, config=CONFIG, rules=rules)
    assert params["embed_tokens"]["embedding"].bits == 8
    assert params["embed_tokens"]["embedding"].outliers is None
    np.testing.assert_array_equal(params["lm_head"]["kernel"], random_params("untied")["lm_head"]["kernel"])
    assert "lm_head" not in report


def test_only_a_rule_with_bits_packs_what_is_dense_by_default():
    plain = dataclasses.replace(CONFIG, embedding_bits=None)
    assert Plan.of(plain, [("*", {"group_size": 32})]).ends(MODELS["untied"]) == ()
    assert Plan.of(plain, [("embed*", {"bits": 8})]).ends(MODELS["untied"]) == ("embed_tokens",)


def test_bits_per_weight_are_those_of_the_blocks():
    params = packed("untied")
    blocks_alone = {name: part for name, part in params.items() if name.startswith("layers_")}
    assert summarize(params).bits_per_weight == summarize(blocks_alone).bits_per_weight
    assert summarize(params).nbytes < summarize(dense(params) | blocks_alone).nbytes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"embedding_bits": 7}, "embed_tokens: bits is 7, but must be one of"),
        ({"embedding_bits": 8, "group_size": 128}, "embed_tokens|layers_0"),
    ],
)
def test_settings_that_cannot_be(settings, named):
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.raises(ValueError, match=named):
        quantize(random_params("tied"), TOKENS, model=MODELS["tied"], config=config)


@pytest.mark.devices
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_split_over_devices_by_the_vocabulary(name):
    model, params = MODELS[name], packed(name)
    sharded = shard_params(params, model, jax.make_mesh((2,), ("model",)))
    assert not isinstance(sharded["embed_tokens"]["embedding"], SpqrTensor)
    np.testing.assert_allclose(LOGITS(model, sharded, TOKENS), LOGITS(model, params, TOKENS), rtol=1e-3, atol=1e-3)


@pytest.mark.devices
def test_quantized_on_several_devices():
    model, params = MODELS["tied"], random_params("tied")
    found, _ = quantize(params, TOKENS, model=model, config=CONFIG, mesh=jax.make_mesh((2,), ("devices",)))
    jax.tree.map(np.testing.assert_array_equal, found["embed_tokens"], packed("tied")["embed_tokens"])
