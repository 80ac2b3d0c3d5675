"""The Falcon family's checkpoints: configuration and tensor names, in Hugging Face's spelling and in GGUF's."""

from functools import partial
from typing import Literal

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
from spqr_jax.models import Falcon, FalconConfig, RotaryConfig

_PARTS = Parts("transformer.word_embeddings", "transformer.ln_f", "lm_head", "transformer.h")
# The norms of each arrangement. GGUF has no names for a sequential block.
_NORMS = {
    "sequential": (
        Names("input_layernorm", "input_layernorm", "attn_norm"),
        Names("post_attention_layernorm", "post_attention_layernorm", ""),
    ),
    "parallel": (Names("input_layernorm", "input_layernorm", "attn_norm"),),
    "parallel_two_norms": (Names("ln_attn", "ln_attn", "attn_norm_2"), Names("ln_mlp", "ln_mlp", "attn_norm")),
}
_FREQUENCIES = r"transformer\.(h\.\d+\.self_attention\.)?(maybe_rotary|rotary_emb|rotary)\.inv_freq"

# Options in the config.json of the time before transformers knew Falcon.
_OLD_OPTIONS = {"n_head": "num_attention_heads", "n_head_kv": "num_kv_heads", "n_layer": "num_hidden_layers"}

# The layout is the order of attn_qkv's rows: see `_groups_from_parts`.
_GGUF_NEUTRAL = {**base.GGUF_NEUTRAL, "tensor_data_layout": ("jploski",)}
_GGUF_KNOWN = {*base.GGUF_KNOWN, "attention.layer_norm_epsilon"}


def read(content: Options) -> FalconConfig:
    """Configuration from `config.json`; missing options have the defaults of transformers' `FalconConfig`.

    Raises:
      ConversionError: a size is missing or not a positive integer, or an option, or how options are combined, is not
        supported.
    """
    if content.get("n_embed") is not None:
        content = {**content, "hidden_size": content["n_embed"]}
    sizes = huggingface_sizes(content)
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    alibi = flag(content, "alibi", False)
    _require_heads(hidden_size, num_heads)
    require_neutral(content, {"head_dim": (None, hidden_size // num_heads)})
    return FalconConfig(
        **sizes,
        mlp_size=size(content, "ffn_hidden_size", 4 * hidden_size),
        num_kv_heads=_kv_heads(content, num_heads),
        arrangement=_arrangement(content),
        rotary=RotaryConfig() if alibi else rotary_from_huggingface(content, sizes["max_positions"]),
        alibi=alibi,
        bias=flag(content, "bias", False),
        norm_epsilon=number(content, "layer_norm_epsilon", 1e-5),
        tie_embeddings=flag(content, "tie_word_embeddings", True),
    )


def read_old(content: Options) -> FalconConfig:
    """Configuration from a `config.json` with the names and defaults from before transformers knew Falcon.

    Raises:
      ConversionError: as `read`.
    """
    content = {_OLD_OPTIONS.get(key, key): value for key, value in content.items()}
    # Of the two versions of the old code, only that of 40B knew this number, and it knew one arrangement only.
    grouped = content.get("num_kv_heads") is not None
    return read({"multi_query": False, "parallel_attn": grouped, "new_decoder_architecture": grouped, **content})


def _kv_heads(content: Options, num_heads: int) -> int:
    num_kv_heads = size(content, "num_kv_heads", num_heads)
    if flag(content, "new_decoder_architecture", False):
        require_groups(num_heads, num_kv_heads)
        return num_kv_heads
    if flag(content, "multi_query", True):
        return 1
    if num_kv_heads != num_heads:
        raise ConversionError(
            f"num_kv_heads {num_kv_heads} of {num_heads} attention heads needs new_decoder_architecture or multi_query"
        )
    return num_heads


def _arrangement(content: Options) -> Literal["sequential", "parallel", "parallel_two_norms"]:
    new, parallel = flag(content, "new_decoder_architecture", False), flag(content, "parallel_attn", True)
    norms = size(content, "num_ln_in_parallel_attn", 2 if new else 1)
    if new and not parallel:
        raise ConversionError("new_decoder_architecture needs parallel_attn")
    if not parallel:
        return "sequential"
    if norms not in ((1, 2) if new else (1,)):
        raise ConversionError(
            f"num_ln_in_parallel_attn {norms} is not supported, only 1 or, with new_decoder_architecture, 2"
        )
    return "parallel_two_norms" if norms == 2 else "parallel"


def _require_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ConversionError(f"hidden_size {hidden_size} cannot be divided among {num_heads} attention heads")
    require_even(hidden_size // num_heads)


def write(config: FalconConfig) -> dict[str, object]:
    """Content of `config.json`; inverse of `read`."""
    grouped = config.num_kv_heads not in (1, config.num_heads)
    new = grouped or config.arrangement == "parallel_two_norms"
    rotary = {} if config.alibi else rotary_to_huggingface(config.rotary)
    return {
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


def read_gguf(file: GgufFile, prefix: str) -> FalconConfig:
    """Configuration from a GGUF file's keys; a second norm and a tied embedding show in its tensors.

    llama.cpp runs every Falcon in parallel, with rotary embedding and without biases.

    Raises:
      ConversionError: a size is missing, differs from block to block, or an option is not supported.
    """
    content = gguf_options(file.metadata, prefix, _GGUF_KNOWN, _GGUF_NEUTRAL)
    sizes = gguf_sizes(content, file)
    _require_heads(sizes["hidden_size"], sizes["num_heads"])
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    require_neutral(
        content, dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), (head_dim,))
    )
    return FalconConfig(
        **sizes,
        arrangement="parallel_two_norms" if "blk.0.attn_norm_2.weight" in file.tensors else "parallel",
        rotary=rotary_from_gguf(content),
        norm_epsilon=number(content, "attention.layer_norm_epsilon"),
    )


def layout(config: FalconConfig, naming: Naming) -> Layout:
    """The tensors of a checkpoint with this configuration, under Hugging Face's names or GGUF's."""
    hidden, mlp, bias = config.hidden_size, config.mlp_size, config.bias
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    groups = partial(_groups_from_parts, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    matrices = (
        Matrix(Names("query_key_value", "self_attention.query_key_value", "attn_qkv"), (rows, hidden), bias, groups),
        Matrix(Names("dense", "self_attention.dense", "attn_output"), (hidden, hidden), bias),
        Matrix(Names("dense_h_to_4h", "mlp.dense_h_to_4h", "ffn_up"), (mlp, hidden), bias),
        Matrix(Names("dense_4h_to_h", "mlp.dense_4h_to_h", "ffn_down"), (hidden, mlp), bias),
    )
    norms = _NORMS[config.arrangement]
    return decoder_layout(
        config, naming, parts=_PARTS, norms=norms, norm_bias=True, matrices=matrices, frequencies=_FREQUENCIES
    )


def _groups_from_parts(
    rows: Float[np.ndarray, "out *in"], num_heads: int, num_kv_heads: int
) -> Float[np.ndarray, "out *in"]:
    """Rows of `query_key_value` in Hugging Face's order, from GGUF's: all queries, then all keys, then all values.

    Hugging Face has one group after the other, one for each key-value head: its query heads, its key and its value.
    """
    heads = rows.reshape(num_heads + 2 * num_kv_heads, -1, *rows.shape[1:])
    queries, keys, values = np.split(heads, [num_heads, num_heads + num_kv_heads])
    queries = queries.reshape(num_kv_heads, -1, *heads.shape[1:])
    return np.concatenate([queries, keys[:, None], values[:, None]], axis=1).reshape(rows.shape)


FALCON = Family(
    name="falcon",
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    model=Falcon,
    read=read,
    write=write,
    read_gguf=read_gguf,
    layout=layout,
    gguf="falcon",
    neutral={
        **base.HUGGINGFACE_NEUTRAL,
        "activation": ("gelu",),
        "apply_residual_connection_post_layernorm": (None, False),
    },
)
