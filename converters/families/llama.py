"""The LLaMA family's checkpoints: configuration and tensor names, in Hugging Face's spelling and in GGUF's."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.families.options import flag, gguf_options, number, require_even, require_groups, require_neutral, size
from converters.families.rotary import (
    ROTARY_KNOWN,
    ROTARY_NEUTRAL,
    rotary_from_gguf,
    rotary_from_huggingface,
    rotary_to_huggingface,
)
from converters.formats.gguf.file import GgufFile
from converters.layout import Layout, Target, Transform, vocabulary_layout
from spqr_jax.models import LlamaConfig, RotaryConfig, layer_name

# The module in a block, its name in a Hugging Face checkpoint and its name in a GGUF file.
NORMS = (
    ("input_layernorm", "input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_layernorm", "ffn_norm"),
)
MATRICES = (
    ("q_proj", "self_attn.q_proj", "attn_q"),
    ("k_proj", "self_attn.k_proj", "attn_k"),
    ("v_proj", "self_attn.v_proj", "attn_v"),
    ("o_proj", "self_attn.o_proj", "attn_output"),
    ("gate_proj", "mlp.gate_proj", "ffn_gate"),
    ("up_proj", "mlp.up_proj", "ffn_up"),
    ("down_proj", "mlp.down_proj", "ffn_down"),
)

# Embedding, final norm and head, likewise.
ENDS = (("model.embed_tokens", "model.norm", "lm_head"), ("token_embd", "output_norm", "output"))

# Options of config.json that change what the model computes, with the values under which they do not.
HUGGINGFACE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "architectures": (None, [], ["LlamaForCausalLM"]),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (None, 1.0),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "sliding_window": (None,),
}

# The same for the keys of a GGUF file; the rest of its `llama.` keys are either known or an error.
GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **ROTARY_NEUTRAL,
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
GGUF_KNOWN = {
    *ROTARY_KNOWN,
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "tensor_data_layout",
    "vocab_size",
}


def from_huggingface(content: Mapping[str, Any]) -> LlamaConfig:
    """Configuration from `config.json`; what is not in it has the defaults of transformers' `LlamaConfig`.

    Raises:
      ConversionError: a size is missing or not a positive integer, or an option is not supported.
    """
    require_neutral({"hidden_act": "silu", **content}, HUGGINGFACE_NEUTRAL)
    hidden_size = size(content, "hidden_size")
    num_heads = size(content, "num_attention_heads")
    num_kv_heads = size(content, "num_key_value_heads", num_heads)
    require_groups(num_heads, num_kv_heads)
    head_dim = size(content, "head_dim", hidden_size // num_heads)
    require_even(head_dim)
    max_positions = size(content, "max_position_embeddings", 2048)
    return LlamaConfig(
        vocab_size=size(content, "vocab_size"),
        hidden_size=hidden_size,
        mlp_size=size(content, "intermediate_size"),
        num_layers=size(content, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary=rotary_from_huggingface(content, max_positions),
        norm_epsilon=number(content, "rms_norm_eps", 1e-6),
        attention_bias=flag(content, "attention_bias", False),
        mlp_bias=flag(content, "mlp_bias", False),
        tie_embeddings=flag(content, "tie_word_embeddings", False),
        max_positions=max_positions,
    )


def to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """Content of `config.json`; inverse of `from_huggingface`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        **rotary_to_huggingface(config.rotary),
    }


def from_gguf(file: GgufFile) -> LlamaConfig:
    """Configuration from the `llama.` keys of a GGUF file; biases and a tied embedding show in its tensors.

    Raises:
      ConversionError: a size is missing, differs from block to block, or an option is not supported.
    """
    content = gguf_options(file.metadata, "llama", GGUF_KNOWN, GGUF_NEUTRAL)
    hidden_size = size(content, "embedding_length")
    num_heads = size(content, "attention.head_count")
    num_kv_heads = size(content, "attention.head_count_kv", num_heads)
    require_groups(num_heads, num_kv_heads)
    head_dim = size(content, "attention.key_length", hidden_size // num_heads)
    require_even(head_dim)
    require_neutral(content, {"attention.value_length": (head_dim,), "rope.dimension_count": (head_dim,)})
    return LlamaConfig(
        vocab_size=size(content, "vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())) or None),
        hidden_size=hidden_size,
        mlp_size=size(content, "feed_forward_length"),
        num_layers=size(content, "block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary=_rotary_from_gguf(content, file, head_dim),
        norm_epsilon=number(content, "attention.layer_norm_rms_epsilon"),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        tie_embeddings="output.weight" not in file.tensors,
        max_positions=size(content, "context_length", 2048),
    )


def _rotary_from_gguf(content: Mapping[str, Any], file: GgufFile, head_dim: int) -> RotaryConfig:
    rotary = rotary_from_gguf(content)
    if "rope_freqs.weight" not in file.tensors:
        return rotary
    if rotary.scaling == "linear":
        raise ConversionError("Linear rotary scaling together with rope_freqs.weight is not supported.")
    divisors = file.tensors["rope_freqs.weight"]
    if divisors.shape != (head_dim // 2,):
        raise ConversionError(f"rope_freqs.weight: expected [{head_dim // 2}], found {list(divisors.shape)}.")
    return rotary_from_divisors(rotary.theta, divisors.read())


def rotary_from_divisors(theta: float, divisors: Float[np.ndarray, " half"]) -> RotaryConfig:
    """The `llama3` scaling whose frequencies are theta^(−2i/head_dim) / divisors[i].

    GGUF stores these divisors instead of the scaling's four numbers. They determine the factor (the largest) and the
    ramp between the two ends, but not the ramp's three numbers one by one; with low_freq_factor 1 and
    high_freq_factor 4, as in every released LLaMA 3, a place on the ramp gives the original context.

    Raises:
      ConversionError: no such scaling has these divisors.
    """
    low, high = 1.0, 4.0
    factor = float(divisors.max())
    if np.all(divisors == 1.0):
        return RotaryConfig(theta)
    if not 0 < divisors.min() <= factor < math.inf:
        raise ConversionError(f"rope_freqs.weight goes from {divisors.min()} to {factor}, not from 1 to a factor.")
    frequencies = np.asarray(RotaryConfig(theta).frequencies(2 * len(divisors)))
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    ramp = (kept > 0.01) & (kept < 0.99)
    if ramp.any():
        contexts = 2 * math.pi * (low + kept[ramp] * (high - low)) / frequencies[ramp]
        rotary = RotaryConfig(theta, "llama3", factor, low, high, round(float(np.median(contexts))))
        if np.allclose(frequencies / np.asarray(rotary.frequencies(2 * len(divisors))), divisors, rtol=1e-5):
            return rotary
    raise ConversionError("rope_freqs.weight is not a llama3 scaling with low_freq_factor 1 and high_freq_factor 4.")


def layout(config: LlamaConfig, naming: Literal["huggingface", "gguf"]) -> Layout:
    """The tensors of a checkpoint with this configuration, under Hugging Face's names or GGUF's."""
    gguf = naming == "gguf"
    embedding, norm, head = ENDS[gguf]
    vocabulary, copies = vocabulary_layout(
        f"{embedding}.weight", f"{head}.weight", (config.vocab_size, config.hidden_size), tied=config.tie_embeddings
    )
    targets = [*vocabulary, Target(("norm", "scale"), f"{norm}.weight", (config.hidden_size,))]
    for index in range(config.num_layers):
        targets.extend(_block(config, index, gguf))
    # Frequencies of the rotary embedding: the configuration gives them (GGUF's have been read with it).
    frequencies = r"rope_freqs\.weight" if gguf else r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    return Layout(tuple(targets), copies, re.compile(frequencies))


def _block(config: LlamaConfig, index: int, gguf: bool) -> Iterator[Target]:
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (config.mlp_size, hidden),
        "up_proj": (config.mlp_size, hidden),
        "down_proj": (hidden, config.mlp_size),
    }
    prefix = f"blk.{index}" if gguf else f"model.layers.{index}"
    for module, *names in NORMS:
        yield Target((layer_name(index), module, "scale"), f"{prefix}.{names[gguf]}.weight", (hidden,))
    for module, *names in MATRICES:
        shape = shapes[module]
        rows: Transform = np.asarray
        if gguf and module in ("q_proj", "k_proj"):
            rows = partial(halves_from_pairs, head_dim=config.head_dim)
        name = f"{prefix}.{names[gguf]}"
        yield Target((layer_name(index), module, "kernel"), f"{name}.weight", shape, _transposed(rows))
        if config.mlp_bias if names[0].startswith("mlp.") else config.attention_bias:
            yield Target((layer_name(index), module, "bias"), f"{name}.bias", shape[:1], rows)


def _transposed(rows: Transform) -> Transform:
    """A PyTorch weight is `[out, in]`, a Flax kernel `[in, out]`."""
    return lambda weight: rows(weight).T


def halves_from_pairs(rows: Float[np.ndarray, "out *in"], head_dim: int) -> Float[np.ndarray, "out *in"]:
    """Rows of a query or key matrix in the order that rotates features (i, i + head_dim/2), from that of GGUF.

    GGUF keeps the original LLaMA's order, where the two features that turn together are neighbours (2i, 2i + 1).
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
