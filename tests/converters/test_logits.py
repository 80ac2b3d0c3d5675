"""Converted models give the logits of PyTorch LLaMAs and Mistrals: in float32, to 1e-4, at logits of order 10."""

import math
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers.tiny_models import (
    Tensors,
    mistral_config,
    random_tensors,
    tiny_config,
    to_bfloat16,
    write_checkpoint,
    write_gguf,
)
from helpers.torch_logits import torch_logits_of

from converters import Pretrained, from_pretrained

torch = pytest.importorskip("torch")

# Three sequences of 40 tokens, padded on the left to different lengths.
TOKENS = np.random.default_rng(1).integers(0, 96, (3, 40))
MASK = np.arange(40) >= np.array([[0], [7], [31]])

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

OPTIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1},
    "as many key-value heads": {"num_key_value_heads": None},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "small head_dim": {"head_dim": 8},
    "large head_dim": {"head_dim": 32, "attention_bias": True},
    "epsilon": {"rms_norm_eps": 0.1},
    "theta": {"rope_theta": 500.0},
    "no theta": {"rope_theta": None},
    "4: linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "4: linear, rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "rope_theta": 500.0},
    "4: llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5000.0},
    "4: default": {"rope_scaling": {"type": "default"}},
    "5: default": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "5: linear": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    },
    "5: llama3": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3, "low_freq_factor": 2.0},
    },
    "5: llama3, context of the model": {
        "rope_theta": None,
        "max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "4: llama3, context beside it": {
        "rope_theta": 500.0,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
}


MISTRAL_OPTIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "large head_dim": {"head_dim": 32},
    "as many key-value heads": {"num_key_value_heads": 4},
    "theta": {"rope_theta": 500.0},
    "5: linear": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    },
}


def torch_logits(directory: Path) -> np.ndarray:
    return torch_logits_of(directory, TOKENS, MASK)


def flax_logits(pretrained: Pretrained) -> np.ndarray:
    # Not jitted: the small operations are compiled once for all tests.
    return np.asarray(
        pretrained.model.apply({"params": pretrained.params}, jnp.asarray(TOKENS), mask=jnp.asarray(MASK))
    )


def assert_same_logits(pretrained: Pretrained, directory: Path) -> None:
    expected = torch_logits(directory)
    assert 5 < expected[MASK].std() < 20
    np.testing.assert_allclose(flax_logits(pretrained)[MASK], expected[MASK], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_huggingface_option(tmp_path: Path, options: dict) -> None:
    config = tiny_config(**options)
    write_checkpoint(tmp_path, config, random_tensors(config))
    assert_same_logits(from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("options", MISTRAL_OPTIONS.values(), ids=MISTRAL_OPTIONS.keys())
def test_mistral_option(tmp_path: Path, options: dict) -> None:
    config = mistral_config(**options)
    write_checkpoint(tmp_path, config, random_tensors(config))
    pretrained = from_pretrained(tmp_path)
    assert pretrained.model.alias == "mistral"
    assert_same_logits(pretrained, tmp_path)


def test_defaults_of_mistral(tmp_path: Path) -> None:
    left_out = (
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "hidden_act",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    config = mistral_config(num_attention_heads=16, **dict.fromkeys(left_out))
    write_checkpoint(tmp_path, config, random_tensors({**config, "num_key_value_heads": 8}))
    pretrained = from_pretrained(tmp_path)
    assert pretrained.model.config.max_positions == transformers.MistralConfig().max_position_embeddings
    assert_same_logits(pretrained, tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_bfloat16_in_shards(tmp_path: Path, shards: int) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path, config, to_bfloat16(random_tensors(config)), shards=shards)
    assert_same_logits(from_pretrained(tmp_path), tmp_path)


def test_tied_head_and_frequencies_may_be_stored(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_checkpoint(tmp_path, config, tensors)
    assert_same_logits(from_pretrained(tmp_path), tmp_path)


def test_bfloat16_parameters(tmp_path: Path) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path, config, random_tensors(config))
    model, params, _ = from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.apply({"params": params}, TOKENS[:, :2]).dtype == jnp.bfloat16


def divisors(head_dim: int, theta: float, rope: dict) -> np.ndarray:
    """llama.cpp's rope_freqs.weight: by how much the scaling divides each frequency, from the wavelengths."""
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    result = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < context / high:
            result.append(1.0)
        elif wavelength > context / low:
            result.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(result, np.float32)


GGUF_OPTIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "head_dim": {"head_dim": 24, "rope_theta": 700.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
}


@pytest.mark.parametrize("options", GGUF_OPTIONS.values(), ids=GGUF_OPTIONS.keys())
def test_gguf_option(tmp_path: Path, options: dict) -> None:
    config = tiny_config(**options)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    rope, metadata = config.get("rope_scaling", {}), {}
    if rope.get("rope_type") == "linear":
        metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "llama3":
        tensors = {**tensors, "rope_freqs.weight": divisors(16, config["rope_theta"], rope)}
    write_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata)
    assert_same_logits(from_pretrained(tmp_path / "model.gguf"), tmp_path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_type(tmp_path: Path, kind: str) -> None:
    kind = gguf.GGMLQuantizationType[kind]
    config = tiny_config()
    tensors = random_tensors(config)

    def rounded(tensor: np.ndarray) -> np.ndarray:
        return gguf.dequantize(gguf.quantize(tensor, kind), kind) if tensor.ndim == 2 else tensor

    reference: Tensors = {name: rounded(tensor) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, config, reference)
    write_gguf(tmp_path / "model.gguf", config, tensors, kind=kind)
    assert_same_logits(from_pretrained(tmp_path / "model.gguf"), tmp_path)


def test_gguf_keys_that_may_be_absent_or_lists(tmp_path: Path) -> None:
    config = tiny_config(num_key_value_heads=None)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    metadata = {
        "llama.attention.head_count_kv": None,
        "llama.attention.key_length": None,
        "llama.attention.value_length": None,
        "llama.rope.freq_base": None,
        "llama.feed_forward_length": [96, 96],
        "llama.expert_count": 0,
    }
    write_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata)
    assert_same_logits(from_pretrained(tmp_path / "model.gguf"), tmp_path)
