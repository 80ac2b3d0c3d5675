"""The Falcon family's checkpoints: configuration and tensor names, in Hugging Face's spelling and in GGUF's."""

from functools import partial

from converters.families import base
from converters.families.base import Family, Matrix, Names, Norm, Parts, decoder_layout, huggingface_sizes
from converters.families.falcon_gguf import groups_from_parts, read_gguf, require_heads
from converters.families.falcon_options import arrangement, kv_heads
from converters.families.rotary import rotary_from_huggingface, rotary_to_huggingface
from converters.formats.options import (
    Options,
    flag,
    number,
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
    require_heads(hidden_size, num_heads)
    require_neutral(content, {"head_dim": (None, hidden_size // num_heads)})
    return FalconConfig(
        **sizes,
        mlp_size=size(content, "ffn_hidden_size", 4 * hidden_size),
        num_kv_heads=kv_heads(content, num_heads),
        arrangement=arrangement(content),
        rotary=RotaryConfig() if alibi else rotary_from_huggingface(content, sizes["max_positions"]),
        alibi=alibi,
        bias=flag(content, "bias", False),
        norm_epsilon=number(content, "layer_norm_epsilon", 1e-5),
        tie_embeddings=flag(content, "tie_word_embeddings", True),
    )


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


def layout(config: FalconConfig, naming: Naming) -> Layout:
    """The tensors of a checkpoint with this configuration, under Hugging Face's names or GGUF's."""
    hidden, mlp, bias = config.hidden_size, config.mlp_size, config.bias
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    groups = partial(groups_from_parts, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    matrices = (
        Matrix(Names("query_key_value", "self_attention.query_key_value", "attn_qkv"), (rows, hidden), bias, groups),
        Matrix(Names("dense", "self_attention.dense", "attn_output"), (hidden, hidden), bias),
        Matrix(Names("dense_h_to_4h", "mlp.dense_h_to_4h", "ffn_up"), (mlp, hidden), bias),
        Matrix(Names("dense_4h_to_h", "mlp.dense_4h_to_h", "ffn_down"), (hidden, mlp), bias),
    )
    norms = [Norm(names, hidden, bias=True) for names in _NORMS[config.arrangement]]
    return decoder_layout(
        config, naming, parts=_PARTS, norms=norms, norm_bias=True, matrices=matrices, ignored=_FREQUENCIES
    )


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
