"""The rotary embedding in Hugging Face's `config.json` and in GGUF's metadata."""

from converters.errors import ConversionError
from converters.formats.options import Neutral, Options, number, require_neutral, size
from spqr_jax.models import RotaryConfig

# GGUF's keys, without the architecture before them: those that are read or change nothing, and those that must not.
ROTARY_KNOWN = {
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
ROTARY_NEUTRAL: Neutral = {"rope.scaling.type": ("none", "linear")}


def rotary_from_huggingface(content: Options, max_positions: int) -> RotaryConfig:
    """`rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` with both (transformers 5)."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"rope_parameters {rope!r} is not an object")
    require_neutral(rope, {"partial_rotary_factor": (None, 1.0)})
    theta = number(rope, "rope_theta", number(content, "rope_theta", 10000.0))
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling == "default":
        return _usable(RotaryConfig(theta))
    if scaling == "linear":
        return _usable(RotaryConfig(theta, "linear", number(rope, "factor")))
    if scaling == "llama3":
        # As in transformers, a number beside the rotary parameters has precedence over one in them.
        given = {key: value for key, value in content.items() if value is not None}
        return _usable(
            RotaryConfig(
                theta,
                "llama3",
                number(rope, "factor"),
                number(rope, "low_freq_factor"),
                number(rope, "high_freq_factor"),
                size({**rope, **given}, "original_max_position_embeddings", max_positions),
            )
        )
    raise ConversionError(f"rotary scaling {scaling!r} is not supported, only default, linear and llama3")


def rotary_to_huggingface(rotary: RotaryConfig) -> dict[str, object]:
    """`rope_theta` and `rope_scaling`, which transformers 4 and 5 both read; inverse of `rotary_from_huggingface`."""
    scaling: dict[str, object] | None = None
    if rotary.scaling != "default":
        scaling = {"rope_type": rotary.scaling, "factor": rotary.factor}
    if scaling and rotary.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rotary.low_freq_factor,
            "high_freq_factor": rotary.high_freq_factor,
            "original_max_position_embeddings": rotary.original_context,
        }
    return {"rope_theta": rotary.theta, "rope_scaling": scaling}


def rotary_from_gguf(content: Options) -> RotaryConfig:
    """The scaling keys as llama.cpp reads them: a factor alone means linear scaling, a factor of 0 none."""
    theta = number(content, "rope.freq_base", 10000.0)
    factor = number(content, "rope.scaling.factor", number(content, "rope.scale_linear", 0.0))
    linear = content.get("rope.scaling.type") != "none" and factor not in (0.0, 1.0)
    return _usable(RotaryConfig(theta, "linear", factor) if linear else RotaryConfig(theta))


def _usable(rotary: RotaryConfig) -> RotaryConfig:
    """Returns its argument, or raises a ConversionError where its angles would not be finite."""
    if min(rotary.theta, rotary.factor) <= 0:
        raise ConversionError(
            f"the rotary base {rotary.theta:g} and the factor of its scaling, {rotary.factor:g}, must be positive"
        )
    if rotary.low_freq_factor >= rotary.high_freq_factor:
        raise ConversionError(
            f"low_freq_factor {rotary.low_freq_factor:g} must be below high_freq_factor {rotary.high_freq_factor:g}"
        )
    return rotary
