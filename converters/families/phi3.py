"""The checkpoints of Phi-3 and Phi-4-mini."""

from collections.abc import Mapping
from typing import Any

from converters.families.gated import Fields, Gated, gated_family, read_gguf_window, read_window
from converters.families.rotary import longrope_attention, rotary_from_huggingface, rotary_to_huggingface
from converters.formats.options import Options, size
from spqr_jax.models import Phi3, Phi3Config


def read(content: Options) -> Fields:
    """Rotation and window; the first releases call longrope `su` or `yarn`."""
    content = {"original_max_position_embeddings": 4096, **content}
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            content = {**content, key: {**rope, "rope_type": "longrope"}}
    max_positions = size(content, "max_position_embeddings", 4096)
    return {
        "rotary": rotary_from_huggingface(content, max_positions, partial=True),
        "window": read_window(content),
    }


def write(config: Any) -> dict[str, object]:
    """Rotation and window; transformers 4 takes a longrope of three entries and no more."""
    options = {**rotary_to_huggingface(config.rotary), "partial_rotary_factor": config.rotary.share}
    rope: Any = options["rope_scaling"]
    context = config.max_positions
    if rope is not None and rope["rope_type"] == "longrope":
        context = config.rotary.original_context
        derived = config.max_positions / context
        attention = longrope_attention(derived, context)
        if (config.rotary.factor, config.rotary.attention_factor) == (derived, attention):
            rope = {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
    return {
        **options,
        "rope_scaling": rope,
        "original_max_position_embeddings": context,
        "sliding_window": config.window,
    }


def read_gguf(content: Options, fields: Fields) -> Fields:
    """The window."""
    return {"window": read_gguf_window(content)}


PHI3 = gated_family(
    "phi3",
    ["Phi3ForCausalLM"],
    Phi3,
    Phi3Config,
    Gated(
        read=read,
        write=write,
        read_gguf=read_gguf,
        gguf_known=frozenset({"attention.sliding_window"}),
        partial=True,
    ),
    gguf="phi3",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    neutral={"attention_bias": (None, False), "mlp_bias": (None, False)},
)
