"""The checkpoints of Gemma 2 and Gemma 3."""

from functools import partial
from typing import Any

from converters.families.gated import NORMS_ON_BOTH_SIDES, Fields, Gated, gated_family, layer_types, windows
from converters.families.gemma_gguf import GGUF_KNOWN, read_gguf
from converters.families.gemma_rotary import read_rotaries, write_rotaries
from converters.formats.options import Options, number, size
from spqr_jax.models import Gemma, GemmaConfig

_GELU = "gelu_pytorch_tanh"


def _cap(content: Options, name: str) -> float | None:
    return None if content.get(name) is None else number(content, name)


def read(generation: int, content: Options) -> Fields:
    """Fields that only a Gemma has."""
    pattern = 2 if generation == 2 else size(content, "sliding_window_pattern", 6)
    fields = {
        **windows(content, lambda index: (index + 1) % pattern != 0),
        "normalizes_heads": generation == 3,
        "attention_scalar": size(content, "query_pre_attn_scalar", 256),
        # transformers and llama.cpp read this option of a Gemma 3 and cap nothing.
        "attention_cap": _cap(content, "attn_logit_softcapping") if generation == 2 else None,
        "logits_cap": _cap(content, "final_logit_softcapping"),
    }
    if generation == 3:
        fields |= read_rotaries(content)
    return fields


def write(generation: int, config: Any) -> dict[str, object]:
    """Inverse of `read`."""
    options: dict[str, object] = {
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
        "query_pre_attn_scalar": config.attention_scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logits_cap,
    }
    if generation == 2:
        return options
    return {**options, **write_rotaries(config)}


def _gemma(generation: int) -> Gated:
    return Gated(
        read=partial(read, generation),
        write=partial(write, generation),
        read_gguf=partial(read_gguf, generation),
        norms=NORMS_ON_BOTH_SIDES,
        gguf_known=GGUF_KNOWN,
        norm_offset=1.0,
    )


_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_NEUTRAL = {
    "hidden_act": (None, _GELU),
    "hidden_activation": (None, _GELU),
    "use_bidirectional_attention": (None, False),
    "mlp_bias": (None, False),
}
GEMMA3_TEXT = gated_family(
    "gemma3_text",
    ["Gemma3ForCausalLM", "Gemma3TextModel"],
    Gemma,
    GemmaConfig,
    _gemma(3),
    gguf="gemma3",
    defaults={**_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072},
    neutral=_NEUTRAL,
)
GEMMA2 = gated_family(
    "gemma2",
    ["Gemma2ForCausalLM"],
    Gemma,
    GemmaConfig,
    _gemma(2),
    gguf="gemma2",
    alias="gemma2",
    defaults={
        **_DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    neutral=_NEUTRAL,
)
