"""The rotary embedding in Hugging Face's `config.json`."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.options import number, require_neutral, size
from spqr_jax.models import RotaryConfig


def rotary_from_huggingface(content: Mapping[str, Any], max_positions: int) -> RotaryConfig:
    """`rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` with both (transformers 5)."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"rope_parameters {rope!r} is not an object.")
    require_neutral(rope, {"partial_rotary_factor": (None, 1.0)})
    theta = number(rope, "rope_theta", number(content, "rope_theta", 10000.0))
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling == "default":
        return RotaryConfig(theta)
    if scaling == "linear":
        return RotaryConfig(theta, "linear", number(rope, "factor"))
    if scaling == "llama3":
        # As in transformers, a number beside the rotary parameters goes before one in them.
        given = {key: value for key, value in content.items() if value is not None}
        return RotaryConfig(
            theta,
            "llama3",
            number(rope, "factor"),
            number(rope, "low_freq_factor"),
            number(rope, "high_freq_factor"),
            size({**rope, **given}, "original_max_position_embeddings", max_positions),
        )
    raise ConversionError(f"Rotary scaling {scaling!r} is not supported, only default, linear and llama3.")
