"""config.json: unsupported options are errors, and a configuration is read as it was written."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_falcon import STYLES, falcon_config, falcon_tensors, write_falcon_gguf
from helpers.tiny_models import mistral_config, random_tensors, tiny_config, write_checkpoint

from converters import ConversionError, from_pretrained
from converters.families.table import FAMILIES, family_of
from converters.formats.options import flag, number, size
from spqr_jax.models import Decoder, Falcon, FalconConfig, Llama, LlamaConfig, RotaryConfig

NEW = {"new_decoder_architecture": True}


def message(path: Path) -> str:
    with pytest.raises(ConversionError) as raised:
        from_pretrained(path)
    return str(raised.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({**NEW, "parallel_attn": False}, "new_decoder_architecture needs parallel_attn"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2"),
        ({**NEW, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3"),
        ({"multi_query": False, "num_kv_heads": 2}, "num_kv_heads 2 of 4 attention heads"),
        ({**NEW, "num_kv_heads": 3}, "4 attention heads .*3 key-value heads"),
        ({"num_attention_heads": 5}, "hidden_size 64 .*5 attention heads"),
        ({"hidden_size": 60}, "heads of 15 features"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ({"activation": "relu"}, "activation 'relu' .*'gelu'"),
        ({"activation": "gelu_new"}, "activation 'gelu_new'"),
        ({"alibi": "yes"}, "alibi must be true or false, found 'yes'"),
        ({"bias": 1}, "bias must be true or false, found 1"),
        ({"architectures": ["FalconForSequenceClassification"]}, "FalconForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional'"),
        ({"num_hidden_layers": True}, "num_hidden_layers .*True"),
        ({"vocab_size": None}, "vocab_size"),
        (
            {"model_type": "RefinedWeb", "n_head_kv": 2, "parallel_attn": False, "new_decoder_architecture": None},
            "needs parallel_attn",
        ),
    ],
)
def test_falcon_option(tmp_path: Path, options: dict, named: str) -> None:
    text = message(write_checkpoint(tmp_path, falcon_config(**options), falcon_tensors(falcon_config())))
    assert re.search(named, text)
    assert "config.json" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"falcon.tensor_data_layout": "plain"}, "tensor_data_layout 'plain'"),
        ({"falcon.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"falcon.rope.dimension_count": 8}, "rope.dimension_count 8"),
        ({"falcon.attention.head_count_kv": 3}, "4 attention heads .*3 key-value heads"),
        ({"falcon.attention.layer_norm_epsilon": None}, "layer_norm_epsilon"),
        ({"falcon.attention.max_alibi_bias": 8.0}, "falcon.attention.max_alibi_bias"),
    ],
)
def test_falcon_gguf_option(tmp_path: Path, metadata: dict, named: str) -> None:
    path = tmp_path / "model.gguf"
    text = message(write_falcon_gguf(path, falcon_config(), falcon_tensors(falcon_config()), metadata=metadata))
    assert re.search(named, text)
    assert "model.gguf" in text
    assert "\n" not in text


def test_all_misfitting_falcon_tensors_in_one_error(tmp_path: Path) -> None:
    tensors = falcon_tensors(falcon_config(**STYLES["40B"]))
    del tensors["transformer.ln_f.bias"]
    text = message(write_checkpoint(tmp_path, falcon_config(**NEW, num_kv_heads=4), tensors))
    assert text.splitlines()[1:] == [
        "  transformer.h.0.self_attention.query_key_value.weight: expected [192, 64], found [128, 64]",
        "  transformer.h.1.self_attention.query_key_value.weight: expected [192, 64], found [128, 64]",
        "  transformer.ln_f.bias: expected [64], found none",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sliding_window": 0}, "sliding_window must be a positive integer .*0"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*MistralForCausalLM"),
        ({"num_attention_heads": 6, "num_key_value_heads": None}, "6 attention heads .*8 key-value heads"),
    ],
)
def test_mistral_option(tmp_path: Path, options: dict, named: str) -> None:
    config = {**mistral_config(**options), **{key: options[key] for key in options if key == "sliding_window"}}
    assert re.search(named, message(write_checkpoint(tmp_path, config, {})))


def test_the_sliding_window_that_mistral_has_by_default(tmp_path: Path) -> None:
    config = {key: value for key, value in mistral_config().items() if key != "sliding_window"}
    model, _, _ = from_pretrained(write_checkpoint(tmp_path, config, random_tensors(config)))
    assert model.config.attention(0).window == 4096


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
def test_llama_flags(tmp_path: Path, key: str) -> None:
    named = f"{key} must be true or false, found 'no'"
    assert named in message(write_checkpoint(tmp_path, tiny_config(**{key: "no"}), {}))


@pytest.mark.parametrize(
    ("read", "value"),
    [(size, True), (size, 2.0), (size, 0), (size, [2, True]), (size, []), (number, True), (number, "1")],
)
def test_not_a_number(read: Callable[[Mapping[str, Any], str], float], value: Any) -> None:
    with pytest.raises(ConversionError, match=f"key must be a .*found {re.escape(repr(value))}"):
        read({"key": value}, "key")


def test_null() -> None:
    assert size({"key": None}, "key", 3) == 3
    assert number({"key": None}, "key", 0.5) == 0.5
    with pytest.raises(ConversionError, match="key must be true or false, found None"):
        flag({"key": None}, "key", False)


LLAMA3 = RotaryConfig(500.0, "llama3", 8.0, 1.5, 4.5, 64)
ROTARY = [RotaryConfig(), RotaryConfig(500.0), RotaryConfig(10.0, "linear", 4.0), LLAMA3]

LLAMAS = [
    LlamaConfig(96, 64, 80, 2, 4, 2, 8, RotaryConfig(), 1e-4, tie_embeddings=True, max_positions=300),
    LlamaConfig(96, 64, 80, 2, 4, 4, 16, RotaryConfig(), attention_bias=True),
    LlamaConfig(96, 64, 80, 2, 4, 1, 32, RotaryConfig(), mlp_bias=True),
]
FALCONS = [
    FalconConfig(96, 64, mlp, 2, 4, kv_heads, arrangement, RotaryConfig(), norm_epsilon=epsilon, max_positions=length)
    for mlp, kv_heads, arrangement, epsilon, length in [
        (256, 1, "parallel", 1e-5, 2048),
        (256, 2, "parallel", 1e-5, 2048),
        (80, 4, "parallel", 1e-5, 300),
        (256, 1, "parallel_two_norms", 1e-5, 2048),
        (256, 2, "parallel_two_norms", 1e-6, 2048),
        (80, 4, "parallel_two_norms", 1e-5, 2048),
        (256, 1, "sequential", 1e-5, 2048),
        (80, 4, "sequential", 1e-5, 2048),
    ]
]


@pytest.mark.parametrize("config", LLAMAS)
@pytest.mark.parametrize("rotary", ROTARY, ids=str)
def test_llama_is_read_as_it_was_written(config: LlamaConfig, rotary: RotaryConfig) -> None:
    config = replace(config, rotary=rotary)
    family = FAMILIES["llama"]
    assert family.from_huggingface(family.to_huggingface(config)) == config


@pytest.mark.parametrize("config", FALCONS, ids=lambda config: f"{config.arrangement}-{config.num_kv_heads}")
@pytest.mark.parametrize("rotary", ROTARY, ids=str)
def test_falcon_is_read_as_it_was_written(config: FalconConfig, rotary: RotaryConfig) -> None:
    family = FAMILIES["falcon"]
    for options in ({"rotary": rotary}, {"alibi": True}, {"bias": True}, {"tie_embeddings": False}):
        changed = replace(config, **options)
        assert family.from_huggingface(family.to_huggingface(changed)) == changed


@pytest.mark.parametrize(
    ("model", "name"),
    [(Llama(LLAMAS[0]), "Llama"), (Llama(LLAMAS[0], alias="mistral"), "Mistral"), (Falcon(FALCONS[0]), "Falcon")],
)
def test_transformers_reads_what_is_written(model: Any, name: str) -> None:
    from transformers import AutoConfig

    config = model.config
    for rotary in ROTARY:
        family = family_of(model)
        content = family.to_huggingface(replace(config, rotary=rotary))
        assert family.from_huggingface(content) == replace(config, rotary=rotary)
        theirs = AutoConfig.for_model(**content)
        assert type(theirs).__name__ == f"{name}Config"
        assert theirs.architectures == [f"{name}ForCausalLM"]
        assert getattr(theirs, "sliding_window", None) is None
        assert theirs.rope_parameters["rope_theta"] == rotary.theta
        assert theirs.rope_parameters["rope_type"] == rotary.scaling
        assert (theirs.vocab_size, theirs.max_position_embeddings) == (96, config.max_positions)


def test_family_of_another_model() -> None:
    with pytest.raises(ConversionError, match="a Decoder cannot be written, supported are llama, falcon"):
        family_of(Decoder(LLAMAS[0]))
    with pytest.raises(ConversionError, match="a Llama with the alias 'yi' cannot be written, supported are llama"):
        family_of(Llama(LLAMAS[0], alias="yi"))
