"""The two rotations of a Gemma 3: of blocks that see the whole text, and of blocks with a window."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.gated import Fields
from converters.families.rotary import rotary_from_huggingface, rotary_to_huggingface
from converters.formats.options import Options, number, size
from spqr_jax.models import GemmaConfig, RotaryConfig


def read_rotaries(content: Options) -> Fields:
    """The rotations of blocks without a window and with one, as transformers 4 or 5 name them."""
    nested = content.get("rope_parameters")
    nested = nested if isinstance(nested, Mapping) else {}
    positions = size(content, "max_position_embeddings", 131072)
    scaling = content.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConversionError(f"rope_scaling {scaling!r} is not an object")
    full = {"rope_theta": number(content, "rope_theta", 1e6), **(nested.get("full_attention") or {}), **scaling}
    local = {"rope_theta": number(content, "rope_local_base_freq", 1e4), **(nested.get("sliding_attention") or {})}
    make = {
        name: rotary_from_huggingface({"rope_parameters": rope}, positions)
        for name, rope in (("rotary", full), ("local_rotary", local))
    }
    return dict(make)


def write_rotaries(config: GemmaConfig) -> dict[str, object]:
    """Inverse of `read_rotaries`: options of transformers 4, and those of version 5."""
    local = config.local_rotary or config.rotary
    rotaries = {"full_attention": config.rotary, "sliding_attention": local}
    return {
        "rope_local_base_freq": local.theta,
        "rope_parameters": {name: _parameters(rotary) for name, rotary in rotaries.items()},
    }


def _parameters(rotary: RotaryConfig) -> dict[str, object]:
    options: dict[str, Any] = rotary_to_huggingface(rotary)
    return {"rope_theta": options["rope_theta"], **(options["rope_scaling"] or {"rope_type": "default"})}
