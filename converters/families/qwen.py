"""The checkpoints of Qwen2, Qwen2.5 and Qwen3."""

from typing import Any

from converters.families.gated import Fields, Gated, gated_family, layer_types, windows
from converters.formats.options import Options, flag, size
from spqr_jax.models import Qwen2, Qwen2Config, Qwen3, Qwen3Config


def read(content: Options) -> Fields:
    """The windows: in blocks from `max_window_layers` on, if they are used."""
    if not flag(content, "use_sliding_window", False):
        content = {**content, "sliding_window": None}
    first = content.get("max_window_layers")
    first = 0 if first == 0 else size(content, "max_window_layers", 28)
    return windows(content, lambda index: index >= first)


def write(config: Any) -> dict[str, object]:
    """The windows, inverse of `read`."""
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
    }


_OWN = Gated(read=read, write=write)

QWEN2 = gated_family(
    "qwen2",
    ["Qwen2ForCausalLM"],
    Qwen2,
    Qwen2Config,
    _OWN,
    gguf="qwen2",
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    # Its biases are fixed; transformers ignores this option.
    neutral={"mlp_bias": (None, False)},
)
QWEN3 = gated_family(
    "qwen3",
    ["Qwen3ForCausalLM"],
    Qwen3,
    Qwen3Config,
    _OWN,
    gguf="qwen3",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    neutral={"mlp_bias": (None, False)},
)
