"""SmolLM3's checkpoints."""

from typing import Any

from converters.errors import ConversionError
from converters.families.gated import Fields, Gated, few_blocks, gated_family, layer_types, windows
from converters.formats.options import Options, flag, size
from spqr_jax.models import SmolLM3, SmolLM3Config

INTERVAL = 4
"""In files of llama.cpp, every fourth block has no rotation."""


def read(content: Options) -> Fields:
    """Which blocks rotate, and which have a window: where `layer_types` is missing, those that do not rotate."""
    layers = few_blocks(size(content, "num_hidden_layers"))
    given = content.get("no_rope_layers")
    if given is None:
        interval = size(content, "no_rope_layer_interval", INTERVAL)
        rotated = tuple((index + 1) % interval != 0 for index in range(layers))
    else:
        if not isinstance(given, list) or len(given) != layers or any(one not in (0, 1) for one in given):
            raise ConversionError(f"no_rope_layers must have a 0 or 1 for each of {layers} blocks, found {given!r}")
        rotated = tuple(bool(one) for one in given)
    if not flag(content, "use_sliding_window", False):
        content = {**content, "sliding_window": None}
    return {"rotated": () if all(rotated) else rotated, **windows(content, lambda index: not rotated[index])}


def write(config: Any) -> dict[str, object]:
    """Options of rotation and windows, inverse of `read`."""
    return {
        "no_rope_layers": [int(config.attention(index).rotary is not None) for index in range(config.num_layers)],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
    }


def read_gguf(content: Options, fields: Fields) -> Fields:
    """Which blocks rotate; the file does not say it."""
    return {"rotated": tuple((index + 1) % INTERVAL != 0 for index in range(few_blocks(fields["num_layers"])))}


SMOLLM3 = gated_family(
    "smollm3",
    ["SmolLM3ForCausalLM"],
    SmolLM3,
    SmolLM3Config,
    Gated(read=read, write=write, read_gguf=read_gguf, pairs=True, theta=2000000.0),
    gguf="smollm3",
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True},
)
