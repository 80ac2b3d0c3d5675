"""The Falcon family's checkpoints: configuration and tensor names, in Hugging Face's spelling and in GGUF's."""

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
from converters.layout import Layout, Target, vocabulary_layout
from spqr_jax.models import FalconConfig, RotaryConfig, layer_name

# The norms of each arrangement: the module in a block, which is also its name in a Hugging Face checkpoint, and its
# name in a GGUF file. GGUF has no names for a sequential block.
NORMS = {
    "sequential": (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "")),
    "parallel": (("input_layernorm", "attn_norm"),),
    "parallel_two_norms": (("ln_attn", "attn_norm_2"), ("ln_mlp", "attn_norm")),
}
MATRICES = (
    ("query_key_value", "self_attention.query_key_value", "attn_qkv"),
    ("dense", "self_attention.dense", "attn_output"),
    ("dense_h_to_4h", "mlp.dense_h_to_4h", "ffn_up"),
    ("dense_4h_to_h", "mlp.dense_4h_to_h", "ffn_down"),
)

# Embedding, final norm and head, likewise.
ENDS = (("transformer.word_embeddings", "transformer.ln_f", "lm_head"), ("token_embd", "output_norm", "output"))

# Names in the config.json of the time before transformers knew Falcon.
OLD_TYPES = ("RefinedWeb", "RefinedWebModel")
OLD_NAMES = {"n_head": "num_attention_heads", "n_head_kv": "num_kv_heads", "n_layer": "num_hidden_layers"}

# Options of config.json that change what the model computes, with the values under which they do not.
HUGGINGFACE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu",),
    "apply_residual_connection_post_layernorm": (None, False),
    "architectures": (None, [], ["FalconForCausalLM"], ["RWForCausalLM"]),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "sliding_window": (None,),
}

# The same for the keys of a GGUF file; the rest of its `falcon.` keys are either known or an error.
GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **ROTARY_NEUTRAL,
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    # The order of attn_qkv's rows: see `groups_from_parts`.
    "tensor_data_layout": ("jploski",),
}
GGUF_KNOWN = {
    *ROTARY_KNOWN,
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "vocab_size",
}


def from_huggingface(content: Mapping[str, Any]) -> FalconConfig:
    """Configuration from `config.json`; options not in it have the defaults of transformers' `FalconConfig`.

    The types `RefinedWeb` and `RefinedWebModel`, from before transformers knew Falcon, have other names and defaults.

    Raises:
      ConversionError: a size is missing or not a positive integer, or an option, or how options are combined, is not
        supported.
    """
    content = _in_new_names(content)
    require_neutral(content, HUGGINGFACE_NEUTRAL)
    hidden_size, num_heads = size(content, "hidden_size"), size(content, "num_attention_heads")
    alibi = flag(content, "alibi", False)
    _require_heads(hidden_size, num_heads)
    require_neutral(content, {"head_dim": (None, hidden_size // num_heads)})
    max_positions = size(content, "max_position_embeddings", 2048)
    return FalconConfig(
        vocab_size=size(content, "vocab_size"),
        hidden_size=hidden_size,
        mlp_size=size(content, "ffn_hidden_size", 4 * hidden_size),
        num_layers=size(content, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(content, num_heads),
        arrangement=_arrangement(content),
        rotary=RotaryConfig() if alibi else rotary_from_huggingface(content, max_positions),
        alibi=alibi,
        bias=flag(content, "bias", False),
        norm_epsilon=number(content, "layer_norm_epsilon", 1e-5),
        tie_embeddings=flag(content, "tie_word_embeddings", True),
        max_positions=max_positions,
    )


def _in_new_names(content: Mapping[str, Any]) -> dict[str, Any]:
    content = dict(content)
    if content.get("n_embed") is not None:
        content["hidden_size"] = content["n_embed"]
    if content.get("model_type") not in OLD_TYPES:
        return content
    content = {OLD_NAMES.get(key, key): value for key, value in content.items()}
    # Of the two versions of the old code, only that of 40B knew this number, and it knew one arrangement only.
    grouped = content.get("num_kv_heads") is not None
    return {"multi_query": False, "parallel_attn": grouped, "new_decoder_architecture": grouped, **content}


def _kv_heads(content: Mapping[str, Any], num_heads: int) -> int:
    num_kv_heads = size(content, "num_kv_heads", num_heads)
    if flag(content, "new_decoder_architecture", False):
        require_groups(num_heads, num_kv_heads)
        return num_kv_heads
    if flag(content, "multi_query", True):
        return 1
    if num_kv_heads != num_heads:
        raise ConversionError(
            f"num_kv_heads {num_kv_heads} of {num_heads} attention heads needs new_decoder_architecture or multi_query."
        )
    return num_heads


def _arrangement(content: Mapping[str, Any]) -> Literal["sequential", "parallel", "parallel_two_norms"]:
    new, parallel = flag(content, "new_decoder_architecture", False), flag(content, "parallel_attn", True)
    norms = size(content, "num_ln_in_parallel_attn", 2 if new else 1)
    if new and not parallel:
        raise ConversionError("new_decoder_architecture needs parallel_attn.")
    if not parallel:
        return "sequential"
    if norms not in ((1, 2) if new else (1,)):
        raise ConversionError(
            f"num_ln_in_parallel_attn {norms} is not supported, only 1 or, with new_decoder_architecture, 2."
        )
    return "parallel_two_norms" if norms == 2 else "parallel"


def _require_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ConversionError(f"hidden_size {hidden_size} cannot be divided among {num_heads} attention heads.")
    require_even(hidden_size // num_heads)


def to_huggingface(config: FalconConfig) -> dict[str, Any]:
    """Content of `config.json`; inverse of `from_huggingface`."""
    grouped = config.num_kv_heads not in (1, config.num_heads)
    new = grouped or config.arrangement == "parallel_two_norms"
    rotary = {} if config.alibi else rotary_to_huggingface(config.rotary)
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "new_decoder_architecture": new,
        "multi_query": config.num_kv_heads == 1,
        "parallel_attn": config.arrangement != "sequential",
        "num_ln_in_parallel_attn": 2 if config.arrangement == "parallel_two_norms" else 1,
        "activation": "gelu",
        "alibi": config.alibi,
        "bias": config.bias,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        **rotary,
    }


def from_gguf(file: GgufFile) -> FalconConfig:
    """Configuration from the `falcon.` keys of a GGUF file; a second norm and a tied embedding show in its tensors.

    llama.cpp runs every Falcon in parallel, with rotary embedding and without biases.

    Raises:
      ConversionError: a size is missing, differs from block to block, or an option is not supported.
    """
    content = gguf_options(file.metadata, "falcon", GGUF_KNOWN, GGUF_NEUTRAL)
    hidden_size, num_heads = size(content, "embedding_length"), size(content, "attention.head_count")
    _require_heads(hidden_size, num_heads)
    head_dim = hidden_size // num_heads
    require_neutral(
        content, dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), (head_dim,))
    )
    num_kv_heads = size(content, "attention.head_count_kv", num_heads)
    require_groups(num_heads, num_kv_heads)
    return FalconConfig(
        vocab_size=size(content, "vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())) or None),
        hidden_size=hidden_size,
        mlp_size=size(content, "feed_forward_length"),
        num_layers=size(content, "block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        arrangement="parallel_two_norms" if "blk.0.attn_norm_2.weight" in file.tensors else "parallel",
        rotary=rotary_from_gguf(content),
        norm_epsilon=number(content, "attention.layer_norm_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        max_positions=size(content, "context_length", 2048),
    )


def layout(config: FalconConfig, naming: Literal["huggingface", "gguf"]) -> Layout:
    """The tensors of a checkpoint with this configuration, under Hugging Face's names or GGUF's."""
    gguf = naming == "gguf"
    embedding, norm, head = ENDS[gguf]
    vocabulary, copies = vocabulary_layout(
        f"{embedding}.weight", f"{head}.weight", (config.vocab_size, config.hidden_size), tied=config.tie_embeddings
    )
    targets = [*vocabulary, *_norm(config, ("norm",), norm)]
    for index in range(config.num_layers):
        targets.extend(_block(config, index, gguf))
    # Frequencies of the rotary embedding: the configuration gives them.
    frequencies = r"transformer\.(h\.\d+\.self_attention\.)?(maybe_rotary|rotary_emb|rotary)\.inv_freq"
    return Layout(tuple(targets), copies, re.compile(frequencies))


def _block(config: FalconConfig, index: int, gguf: bool) -> Iterator[Target]:
    hidden = config.hidden_size
    shapes = {
        "query_key_value": ((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (config.mlp_size, hidden),
        "dense_4h_to_h": (hidden, config.mlp_size),
    }
    prefix = f"blk.{index}" if gguf else f"transformer.h.{index}"
    for module, gguf_name in NORMS[config.arrangement]:
        yield from _norm(config, (layer_name(index), module), f"{prefix}.{gguf_name if gguf else module}")
    for module, *names in MATRICES:
        name = f"{prefix}.{names[gguf]}"
        transform = np.transpose
        if gguf and module == "query_key_value":
            transform = partial(_grouped_kernel, config=config)
        yield Target((layer_name(index), module, "kernel"), f"{name}.weight", shapes[module], transform)
        if config.bias:
            yield Target((layer_name(index), module, "bias"), f"{name}.bias", shapes[module][:1])


def _norm(config: FalconConfig, path: tuple[str, ...], name: str) -> Iterator[Target]:
    yield Target((*path, "scale"), f"{name}.weight", (config.hidden_size,))
    yield Target((*path, "bias"), f"{name}.bias", (config.hidden_size,))


def _grouped_kernel(rows: Float[np.ndarray, "out in"], config: FalconConfig) -> Float[np.ndarray, "in out"]:
    return groups_from_parts(rows, config.num_heads, config.num_kv_heads).T


def groups_from_parts(
    rows: Float[np.ndarray, "out in"], num_heads: int, num_kv_heads: int
) -> Float[np.ndarray, "out in"]:
    """Rows of `query_key_value` in Hugging Face's order, from GGUF's: all queries, then all keys, then all values.

    Hugging Face has one group after the other, one for each key-value head: its query heads, its key and its value.
    """
    heads = rows.reshape(num_heads + 2 * num_kv_heads, -1, rows.shape[1])
    queries, keys, values = np.split(heads, [num_heads, num_heads + num_kv_heads])
    queries = queries.reshape(num_kv_heads, -1, *heads.shape[1:])
    return np.concatenate([queries, keys[:, None], values[:, None]], axis=1).reshape(rows.shape)
