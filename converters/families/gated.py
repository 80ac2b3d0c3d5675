"""The base of LLaMA-like families: options and tensors that all of them have, in both spellings.

A family adds what differs, by functions that return further fields or options.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.families import base
from converters.families.base import Family, Matrix, Names, Norm, Parts, decoder_layout, gguf_sizes, huggingface_sizes
from converters.families.rotary import (
    FREQUENCIES,
    SCALED_KNOWN,
    require_factors,
    rotary_from_huggingface,
    rotary_to_huggingface,
    scaled_from_gguf,
)
from converters.formats.gguf.file import GgufFile
from converters.formats.options import (
    Neutral,
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
from spqr_jax.models import RotaryConfig
from spqr_jax.models.gated import GatedConfig, GatedDecoder

PARTS = Parts("model.embed_tokens", "model.norm", "lm_head", "model.layers")

MATRICES = {
    "q_proj": Names("q_proj", "self_attn.q_proj", "attn_q"),
    "k_proj": Names("k_proj", "self_attn.k_proj", "attn_k"),
    "v_proj": Names("v_proj", "self_attn.v_proj", "attn_v"),
    "qkv_proj": Names("qkv_proj", "self_attn.qkv_proj", "attn_qkv"),
    "o_proj": Names("o_proj", "self_attn.o_proj", "attn_output"),
    "gate_proj": Names("gate_proj", "mlp.gate_proj", "ffn_gate"),
    "up_proj": Names("up_proj", "mlp.up_proj", "ffn_up"),
    "gate_up_proj": Names("gate_up_proj", "mlp.gate_up_proj", "ffn_up"),
    "down_proj": Names("down_proj", "mlp.down_proj", "ffn_down"),
    "router": Names("router", "mlp.gate", "ffn_gate_inp"),
}
"""Names of the matrices of a block."""

OF_EXPERTS = {
    "gate_proj": Names("gate_proj", "mlp.experts.{}.gate_proj", "ffn_gate_exps"),
    "up_proj": Names("up_proj", "mlp.experts.{}.up_proj", "ffn_up_exps"),
    "down_proj": Names("down_proj", "mlp.experts.{}.down_proj", "ffn_down_exps"),
}
"""Names of the matrices that every expert has."""

NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
"""GGUF's name of each norm of a LLaMA's block."""

NORMS_ON_BOTH_SIDES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""GGUF's name of each norm of a block that also normalizes what it adds."""

_IGNORED = rf"{FREQUENCIES}|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
_NEUTRAL: Neutral = {
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (None, False),
    "quantization_config": (None,),
}
_GGUF_NEUTRAL: Neutral = {"attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,)}
_GGUF_KNOWN = base.GGUF_KNOWN | SCALED_KNOWN | {"attention.layer_norm_rms_epsilon", "tensor_data_layout"}

MOST_BLOCKS = 10_000

Fields = dict[str, Any]
"""Fields of a configuration."""


@dataclass(frozen=True)
class Gated:
    """The options and names that a LLaMA-like family has of its own.

    Attributes:
      read: fields from `config.json`, in addition to or instead of the ones that all families have.
      write: options of `config.json`, likewise.
      read_gguf: fields from GGUF's keys, without their prefix, and the fields that all families have.
      norms: GGUF's name of each norm of a block.
      gguf_known: keys that `read_gguf` reads, or that change nothing.
      gguf_neutral: keys that change the model, with the values under which they do not.
      pairs: GGUF has queries and keys with the two features of a pair beside each other.
      norm_offset: what GGUF has added to the weights of norms.
      theta: base of the rotary embedding where `config.json` has none.
      partial: heads may be rotated in part.
    """

    read: Callable[[Options], Fields] = lambda content: {}
    write: Callable[[Any], dict[str, object]] = lambda config: {}
    read_gguf: Callable[[Options, Fields], Fields] = lambda content, fields: {}
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    gguf_known: frozenset[str] = frozenset()
    gguf_neutral: Neutral = field(default_factory=dict)
    pairs: bool = False
    norm_offset: float = 0.0
    theta: float = 10000.0
    partial: bool = False


def gated_family(
    name: str,
    architectures: Sequence[str],
    model: type[GatedDecoder],
    config: type[GatedConfig],
    own: Gated,
    *,
    gguf: str | None = None,
    alias: str | None = None,
    defaults: Options | None = None,
    neutral: Neutral | None = None,
) -> Family:
    """The `Family` of a LLaMA-like model; arguments are its attributes, `own` is what the base does not know."""
    return Family(
        name=name,
        architectures=tuple(architectures),
        model=model,
        read=partial(read, config, own),
        write=partial(write, own),
        read_gguf=partial(read_gguf, config, own),
        layout=partial(layout, own),
        gguf=gguf,
        alias=alias,
        defaults=defaults or {},
        neutral={**_NEUTRAL, **(neutral or {})},
    )


def read(make: type[GatedConfig], own: Gated, content: Options) -> GatedConfig:
    """Configuration from `config.json`.

    Raises:
      ConversionError: a size is missing or not a positive integer, or an option is not supported.
    """
    sizes = huggingface_sizes(content)
    num_kv_heads = size(content, "num_key_value_heads", sizes["num_heads"])
    require_groups(sizes["num_heads"], num_kv_heads)
    head_dim = size(content, "head_dim", sizes["hidden_size"] // sizes["num_heads"])
    require_even(head_dim)
    fields: Fields = {
        **sizes,
        "mlp_size": size(content, "intermediate_size"),
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_epsilon": number(content, "rms_norm_eps", 1e-6),
        "attention_bias": flag(content, "attention_bias", False),
        "mlp_bias": flag(content, "mlp_bias", False),
        "tie_embeddings": flag(content, "tie_word_embeddings", False),
        **own.read(content),
    }
    if "rotary" not in fields:
        fields["rotary"] = rotary_from_huggingface(
            content, sizes["max_positions"], theta=own.theta, partial=own.partial
        )
    require_factors(fields["rotary"], head_dim)
    return make(**fields)


def write(own: Gated, config: GatedConfig) -> dict[str, object]:
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
        **own.write(config),
    }


def read_gguf(make: type[GatedConfig], own: Gated, file: GgufFile, prefix: str) -> GatedConfig:
    """Configuration from a GGUF file's keys; biases and a tied embedding show in its tensors.

    Raises:
      ConversionError: a size is missing, differs from block to block, or an option is not supported.
    """
    neutral = {"attention.sliding_window": (0,), **_GGUF_NEUTRAL, **own.gguf_neutral}
    neutral = {key: values for key, values in neutral.items() if key not in own.gguf_known}
    content = gguf_options(file.metadata, prefix, _GGUF_KNOWN | own.gguf_known, neutral)
    sizes = gguf_sizes(content, file)
    head_dim = size(content, "attention.key_length", sizes["hidden_size"] // sizes["num_heads"])
    require_even(head_dim)
    require_neutral(content, {"attention.value_length": (head_dim,)})
    if not own.partial:
        require_neutral(content, {"rope.dimension_count": (head_dim,)})
    fields: Fields = {
        **sizes,
        "head_dim": head_dim,
        "rotary": scaled_from_gguf(content, file, head_dim, sizes["max_positions"]),
        "norm_epsilon": number(content, "attention.layer_norm_rms_epsilon"),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    return make(**fields | own.read_gguf(content, fields))


def layout(own: Gated, config: GatedConfig, naming: Naming) -> Layout:
    """The tensors of a checkpoint with this configuration, under Hugging Face's names or GGUF's."""
    halves = partial(_halves_from_pairs, head_dim=config.head_dim) if own.pairs else np.asarray
    matrices = [
        Matrix(
            names=OF_EXPERTS[name] if name in config.stacks else MATRICES[name],
            shape=shape,
            bias=name in config.biased,
            from_gguf=halves if name in ("q_proj", "k_proj") else np.asarray,
            experts=config.stacks.get(name),
        )
        for name, shape in config.matrices.items()
    ]
    norms = [Norm(Names(name, name, gguf), config.hidden_size) for name, gguf in own.norms.items()]
    if config.head_norms is not None:
        each = config.head_norms == "each"
        heads = {"q": config.num_heads, "k": config.num_kv_heads}
        norms += [
            Norm(Names(f"{x}_norm", f"self_attn.{x}_norm", f"attn_{x}_norm"), config.head_dim * (1 if each else count))
            for x, count in heads.items()
        ]
    return decoder_layout(
        config,
        naming,
        parts=PARTS,
        norms=norms,
        matrices=matrices,
        ignored=_IGNORED,
        from_gguf=partial(_without, own.norm_offset) if own.norm_offset else np.asarray,
    )


def _without(offset: float, scale: Float[np.ndarray, " features"]) -> Float[np.ndarray, " features"]:
    """The weight of a norm, from one to which GGUF has added a number."""
    with np.errstate(invalid="ignore"):  # of damaged values, the reader tells
        return scale - offset


def _halves_from_pairs(rows: Float[np.ndarray, "out *in"], head_dim: int) -> Float[np.ndarray, "out *in"]:
    """Rows of a query or key matrix in the order that rotates features (i, i + head_dim/2), from that of GGUF.

    GGUF keeps the original LLaMA's order, in which the two features of a pair are neighbours (2i, 2i + 1).
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read_window(content: Options) -> int | None:
    """The window of all blocks, from `sliding_window`."""
    return None if content.get("sliding_window") is None else size(content, "sliding_window")


def read_gguf_window(content: Options) -> int | None:
    """The window of blocks that have one, from GGUF's key; None where it is missing or 0."""
    key = "attention.sliding_window"
    return size(content, key) if content.get(key) else None


def windows(content: Options, default: Callable[[int], bool]) -> Fields:
    """Fields of the windows, from `sliding_window` and `layer_types`.

    Args:
      content: of `config.json`.
      default: whether a block has a window where `layer_types` is missing.

    Raises:
      ConversionError: the options contradict each other.
    """
    layers = few_blocks(size(content, "num_hidden_layers"))
    types = content.get("layer_types")
    if types is None:
        windowed = tuple(map(default, range(layers)))
    else:
        names = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or len(types) != layers:
            raise ConversionError(f"layer_types must name {layers} kinds of attention, one per block, found {types!r}")
        unknown = [kind for kind in types if kind not in names]
        if unknown:
            raise ConversionError(f"layer_types {unknown[0]!r} is not supported, only {' and '.join(names)}")
        windowed = tuple(names[kind] for kind in types)
    window = read_window(content)
    if window is None:
        if types is not None and any(windowed):
            raise ConversionError("layer_types has sliding_attention, but there is no sliding_window; give its tokens")
        return {}
    if not any(windowed):
        return {}
    return {"window": window, "windowed": () if all(windowed) else windowed}


def few_blocks(count: int) -> int:
    """A number of blocks for which a list may be made: one in a damaged file may be huge."""
    if count > MOST_BLOCKS:
        raise ConversionError(f"{count} blocks are more than the {MOST_BLOCKS} that any model has")
    return count


def layer_types(config: GatedConfig) -> list[str]:
    """The option of `config.json` that says which blocks have a window."""
    kinds = {True: "full_attention", False: "sliding_attention"}
    return [kinds[config.window_of(index) is None] for index in range(config.num_layers)]


def rotary_of(content: Options, *, theta: float) -> RotaryConfig:
    """The rotary embedding of a `config.json`, with a base where there is none."""
    return rotary_from_huggingface(content, huggingface_sizes(content)["max_positions"], theta=theta)
