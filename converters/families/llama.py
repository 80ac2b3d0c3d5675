"""The LLaMA family's checkpoints: configuration and tensor names, in Hugging Face's spelling and in GGUF's."""

import math
from functools import partial

import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.families import base
from converters.families.base import Family, Matrix, Names, Parts, decoder_layout, gguf_sizes, huggingface_sizes
from converters.families.rotary import rotary_from_gguf, rotary_from_huggingface, rotary_to_huggingface
from converters.formats.gguf.file import GgufFile
from converters.formats.options import (
    Options,
    flag,
    gguf_options,
    number,
    require_even,
    require_groups,
    require_neutral,
    size,
)
from converters.formats.source import Naming
from converters.layout import Layout
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig

_PARTS = Parts("model.embed_tokens", "model.norm", "lm_head", "model.layers")
_NORMS = (
    Names("input_layernorm", "input_layernorm", "attn_norm"),
    Names("post_attention_layernorm", "post_attention_layernorm", "ffn_norm"),
)
# GGUF's frequencies are read with the configuration.
_FREQUENCIES = r"rope_freqs\.weight|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

_GGUF_NEUTRAL = {**base.GGUF_NEUTRAL, "expert_count": (0,), "expert_used_count": (0,)}
_GGUF_KNOWN = {*base.GGUF_KNOWN, "attention.layer_norm_rms_epsilon", "tensor_data_layout"}


def read(content: Options) -> LlamaConfig:
    """Configuration from `config.json`; missing options have the defaults of transformers' `LlamaConfig`.

    Raises:
      ConversionError: a size is missing or not a positive integer, or an option is not supported.
    """
    sizes = huggingface_sizes(content)
    num_kv_heads = size(content, "num_key_value_heads", sizes["num_heads"])
    require_groups(sizes["num_heads"], num_kv_heads)
    head_dim = size(content, "head_dim", sizes["hidden_size"] // sizes["num_heads"])
    require_even(head_dim)
    return LlamaConfig(
        **sizes,
        mlp_size=size(content, "intermediate_size"),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary=rotary_from_huggingface(content, sizes["max_positions"]),
        norm_epsilon=number(content, "rms_norm_eps", 1e-6),
        attention_bias=flag(content, "attention_bias", False),
        mlp_bias=flag(content, "mlp_bias", False),
        tie_embeddings=flag(content, "tie_word_embeddings", False),
    )


def write(config: LlamaConfig) -> dict[str, object]:
    """Content of `config.json`; inverse of `read`."""
    return {
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


def read_gguf(file: GgufFile, prefix: str) -> LlamaConfig:
    """Configuration from a GGUF file's keys; biases and a tied embedding show in its tensors.

    Raises:
      ConversionError: a size is missing, differs from block to block, or an option is not supported.
    """
    content = gguf_options(file.metadata, prefix, _GGUF_KNOWN, _GGUF_NEUTRAL)
    sizes = gguf_sizes(content, file)
    head_dim = size(content, "attention.key_length", sizes["hidden_size"] // sizes["num_heads"])
    require_even(head_dim)
    require_neutral(content, {"attention.value_length": (head_dim,), "rope.dimension_count": (head_dim,)})
    return LlamaConfig(
        **sizes,
        head_dim=head_dim,
        rotary=_rotary_from_gguf(content, file, head_dim),
        norm_epsilon=number(content, "attention.layer_norm_rms_epsilon"),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
    )


def _rotary_from_gguf(content: Options, file: GgufFile, head_dim: int) -> RotaryConfig:
    rotary = rotary_from_gguf(content)
    if "rope_freqs.weight" not in file.tensors:
        return rotary
    if rotary.scaling == "linear":
        raise ConversionError("linear rotary scaling together with rope_freqs.weight is not supported")
    divisors = file.tensors["rope_freqs.weight"]
    if divisors.shape != (head_dim // 2,):
        raise ConversionError(f"rope_freqs.weight: expected [{head_dim // 2}], found {list(divisors.shape)}")
    return _rotary_from_divisors(rotary.theta, divisors.read_array())


def _rotary_from_divisors(theta: float, divisors: Float[np.ndarray, " half"]) -> RotaryConfig:
    """The `llama3` scaling whose frequencies are theta^(−2i/head_dim) / divisors[i].

    GGUF stores these divisors instead of the scaling's four numbers. They determine the factor (the largest) and the
    ramp between the two ends, but not the ramp's three numbers one by one. With low_freq_factor 1 and
    high_freq_factor 4, as in every released LLaMA 3, a place on the ramp gives the original context.

    Raises:
      ConversionError: no such scaling has these divisors.
    """
    low, high = 1.0, 4.0
    factor = float(divisors.max())
    if np.all(divisors == 1.0):
        return RotaryConfig(theta)
    if not 0 < divisors.min() <= factor < math.inf:
        raise ConversionError(f"rope_freqs.weight runs from {divisors.min()} to {factor}, not from 1 to a factor")
    frequencies = np.asarray(RotaryConfig(theta).frequencies(2 * len(divisors)))
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    ramp = (kept > 0.01) & (kept < 0.99)
    if ramp.any():
        contexts = 2 * math.pi * (low + kept[ramp] * (high - low)) / frequencies[ramp]
        rotary = RotaryConfig(theta, "llama3", factor, low, high, round(float(np.median(contexts))))
        if np.allclose(frequencies / np.asarray(rotary.frequencies(2 * len(divisors))), divisors, rtol=1e-5):
            return rotary
    raise ConversionError("rope_freqs.weight is not a llama3 scaling with low_freq_factor 1 and high_freq_factor 4")


def layout(config: LlamaConfig, naming: Naming) -> Layout:
    """The tensors of a checkpoint with this configuration, under Hugging Face's names or GGUF's."""
    hidden, mlp = config.hidden_size, config.mlp_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, feed_forward = config.attention_bias, config.mlp_bias
    halves = partial(_halves_from_pairs, head_dim=config.head_dim)
    matrices = (
        Matrix(Names("q_proj", "self_attn.q_proj", "attn_q"), (queries, hidden), attention, halves),
        Matrix(Names("k_proj", "self_attn.k_proj", "attn_k"), (keys, hidden), attention, halves),
        Matrix(Names("v_proj", "self_attn.v_proj", "attn_v"), (keys, hidden), attention),
        Matrix(Names("o_proj", "self_attn.o_proj", "attn_output"), (hidden, queries), attention),
        Matrix(Names("gate_proj", "mlp.gate_proj", "ffn_gate"), (mlp, hidden), feed_forward),
        Matrix(Names("up_proj", "mlp.up_proj", "ffn_up"), (mlp, hidden), feed_forward),
        Matrix(Names("down_proj", "mlp.down_proj", "ffn_down"), (hidden, mlp), feed_forward),
    )
    return decoder_layout(
        config, naming, parts=_PARTS, norms=_NORMS, norm_bias=False, matrices=matrices, frequencies=_FREQUENCIES
    )


def _halves_from_pairs(rows: Float[np.ndarray, "out *in"], head_dim: int) -> Float[np.ndarray, "out *in"]:
    """Rows of a query or key matrix in the order that rotates features (i, i + head_dim/2), from that of GGUF.

    GGUF keeps the original LLaMA's order, in which the two features of a pair are neighbours (2i, 2i + 1).
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


LLAMA = Family(
    name="llama",
    # The second is the spelling before transformers 4.28.
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model=Llama,
    read=read,
    write=write,
    read_gguf=read_gguf,
    layout=layout,
    gguf="llama",
    neutral={
        **base.HUGGINGFACE_NEUTRAL,
        "hidden_act": ("silu", "swish"),
        "rope_interleaved": (None, False),
    },
)
