"""The rotary embedding in Hugging Face's `config.json` and in GGUF's metadata."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.formats.gguf.file import GgufFile
from converters.formats.options import Neutral, Options, flag, number, numbers, require_neutral, size
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
SCALED_KNOWN = {
    *ROTARY_KNOWN,
    "rope.scaling.attn_factor",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}

FREQUENCIES = r"rope_freqs\.weight|rope_factors_(long|short)\.weight"
"""Matches GGUF's tensors of frequencies, which are read with the configuration."""


def rotary_from_huggingface(
    content: Options, max_positions: int, *, theta: float = 10000.0, partial: bool = False
) -> RotaryConfig:
    """`rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` with both (transformers 5).

    Args:
      content: of `config.json`.
      max_positions: longest text of the model.
      theta: the base where none is given.
      partial: heads may be rotated in part.

    Raises:
      ConversionError: an option is not supported, missing, or cannot be used.
    """
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConversionError(f"rope_parameters {rope!r} is not an object")
    share = number(rope, "partial_rotary_factor", number(content, "partial_rotary_factor", 1.0))
    if not partial:
        require_neutral({"partial_rotary_factor": share}, {"partial_rotary_factor": (1.0,)})
    rotary = RotaryConfig(number(rope, "rope_theta", number(content, "rope_theta", theta)), share=share)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(scaling, str) or scaling not in _READERS:
        *first, last = _READERS
        raise ConversionError(f"rotary scaling {scaling!r} is not supported, only {', '.join(first)} and {last}")
    # As in transformers, a number beside the rotary parameters has precedence over one in them.
    given = {key: value for key, value in content.items() if value is not None}
    context = size({**rope, **given}, "original_max_position_embeddings", max_positions)
    return _usable(_READERS[scaling](rotary, rope, context, max_positions))


_Reader = Callable[[RotaryConfig, Options, int, int], RotaryConfig]
"""Adds a scaling, from its options, the original context and the longest text of the model."""


def _default(rotary: RotaryConfig, rope: Options, context: int, max_positions: int) -> RotaryConfig:
    return rotary


def _linear(rotary: RotaryConfig, rope: Options, context: int, max_positions: int) -> RotaryConfig:
    return replace(rotary, scaling="linear", factor=number(rope, "factor"))


def _dynamic(rotary: RotaryConfig, rope: Options, context: int, max_positions: int) -> RotaryConfig:
    return replace(rotary, scaling="dynamic", factor=number(rope, "factor"), original_context=max_positions)


def _llama3(rotary: RotaryConfig, rope: Options, context: int, max_positions: int) -> RotaryConfig:
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    return replace(
        rotary,
        scaling="llama3",
        factor=number(rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=context,
    )


def _yarn(rotary: RotaryConfig, rope: Options, context: int, max_positions: int) -> RotaryConfig:
    factor = number(rope, "factor", max_positions / context)
    scale, all_scale = number(rope, "mscale", 0.0), number(rope, "mscale_all_dim", 0.0)
    attention = _magnitude(factor, scale) / _magnitude(factor, all_scale) if scale and all_scale else _magnitude(factor)
    return replace(
        rotary,
        scaling="yarn",
        factor=factor,
        original_context=context,
        attention_factor=number(rope, "attention_factor", attention),
        # transformers reads a 0 as the default, too.
        beta_fast=number(rope, "beta_fast", 32.0) or 32.0,
        beta_slow=number(rope, "beta_slow", 1.0) or 1.0,
        truncate=flag(rope, "truncate", True),
    )


def _longrope(rotary: RotaryConfig, rope: Options, context: int, max_positions: int) -> RotaryConfig:
    factor = number(rope, "factor", max_positions / context)
    return replace(
        rotary,
        scaling="longrope",
        factor=factor,
        original_context=context,
        attention_factor=number(rope, "attention_factor", longrope_attention(factor, context)),
        short_factors=numbers(rope, "short_factor"),
        long_factors=numbers(rope, "long_factor"),
    )


_READERS: Mapping[str, _Reader] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """Factor of cosines and sines that the authors of yarn found best."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention(factor: float, context: int) -> float:
    """Factor of cosines and sines of longrope: sqrt(1 + ln(factor) / ln(context))."""
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 and context > 1 else 1.0


def rotary_to_huggingface(rotary: RotaryConfig) -> dict[str, object]:
    """`rope_theta` and `rope_scaling`, which transformers 4 and 5 both read; inverse of `rotary_from_huggingface`."""
    own: dict[str, dict[str, object]] = {
        "default": {},
        "linear": {"factor": rotary.factor},
        "dynamic": {"factor": rotary.factor},
        "llama3": {
            "factor": rotary.factor,
            "low_freq_factor": rotary.low_freq_factor,
            "high_freq_factor": rotary.high_freq_factor,
            "original_max_position_embeddings": rotary.original_context,
        },
        "yarn": {
            "factor": rotary.factor,
            "original_max_position_embeddings": rotary.original_context,
            "attention_factor": rotary.attention_factor,
            "beta_fast": rotary.beta_fast,
            "beta_slow": rotary.beta_slow,
            "truncate": rotary.truncate,
        },
        "longrope": {
            "factor": rotary.factor,
            "original_max_position_embeddings": rotary.original_context,
            "attention_factor": rotary.attention_factor,
            "short_factor": list(rotary.short_factors),
            "long_factor": list(rotary.long_factors),
        },
    }
    scaling = {"rope_type": rotary.scaling, **own[rotary.scaling]} if rotary.scaling != "default" else None
    return {"rope_theta": rotary.theta, "rope_scaling": scaling}


def rotary_from_gguf(content: Options) -> RotaryConfig:
    """The scaling keys as llama.cpp reads them: a factor alone means linear scaling, a factor of 0 none."""
    theta = number(content, "rope.freq_base", 10000.0)
    factor = number(content, "rope.scaling.factor", number(content, "rope.scale_linear", 0.0))
    linear = content.get("rope.scaling.type") != "none" and factor not in (0.0, 1.0)
    return _usable(RotaryConfig(theta, "linear", factor) if linear else RotaryConfig(theta))


def scaled_from_gguf(content: Options, file: GgufFile, head_dim: int, max_positions: int) -> RotaryConfig:
    """As `rotary_from_gguf`, and the scalings that LLaMA-like models have: llama3, yarn, longrope; in part of a head.

    Raises:
      ConversionError: a scaling is not supported, or its tensors do not fit it.
    """
    features = size(content, "rope.dimension_count", head_dim)
    scaling = content.get("rope.scaling.type", "none" if "rope.scaling.factor" not in content else "linear")
    require_neutral({"rope.scaling.type": scaling}, {"rope.scaling.type": ("none", "linear", "yarn", "longrope")})
    base = RotaryConfig(number(content, "rope.freq_base", 10000.0), share=features / head_dim)
    context = size(content, "rope.scaling.original_context_length", max_positions)
    divisors = {name: _divisors(file, name, features) for name in ("freqs", "factors_short", "factors_long")}
    if divisors["factors_short"] is not None and divisors["factors_long"] is not None:
        attention = longrope_attention(max_positions / context, context)
        short, long = divisors["factors_short"], divisors["factors_long"]
        return _usable(
            replace(
                base,
                scaling="longrope",
                factor=max_positions / context,
                original_context=context,
                attention_factor=number(content, "rope.scaling.attn_factor", attention),
                short_factors=tuple(short.tolist()),
                long_factors=tuple(long.tolist()),
            )
        )
    if scaling == "yarn":
        factor = number(content, "rope.scaling.factor")
        return _usable(
            replace(
                base,
                scaling="yarn",
                factor=factor,
                original_context=context,
                attention_factor=_magnitude(factor) * number(content, "rope.scaling.attn_factor", 1.0),
                beta_fast=number(content, "rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=number(content, "rope.scaling.yarn_beta_slow", 1.0),
            )
        )
    linear = rotary_from_gguf(content)
    if divisors["freqs"] is None:
        return replace(linear, share=base.share)
    if linear.scaling == "linear":
        raise ConversionError("linear rotary scaling together with rope_freqs.weight is not supported")
    return replace(_rotary_from_divisors(base.theta, divisors["freqs"]), share=base.share)


def _divisors(file: GgufFile, name: str, features: int) -> Float[np.ndarray, " half"] | None:
    tensor = file.tensors.get(f"rope_{name}.weight")
    if tensor is None:
        return None
    if tensor.shape != (features // 2,):
        raise ConversionError(f"rope_{name}.weight: expected [{features // 2}], found {list(tensor.shape)}")
    return tensor.read_array()


def _rotary_from_divisors(theta: float, divisors: Float[np.ndarray, " half"]) -> RotaryConfig:
    """The `llama3` scaling whose frequencies are theta^(−2i/head_dim) / divisors[i].

    GGUF stores these divisors instead of the scaling's four numbers. They determine the factor (the largest) and the
    ramp between the two ends, but not the ramp's three numbers one by one. With low_freq_factor 1 and
    high_freq_factor 4, as in every released LLaMA 3, a place on the ramp gives the original context.

    Raises:
      ConversionError: no such scaling has these divisors.
    """
    low, high = 1.0, 4.0
    factor = float(divisors.max())
    if np.all(divisors == 1.0):
        return RotaryConfig(theta)
    if not (divisors.min() > 0.9 and 1 < factor < math.inf):
        raise ConversionError(f"rope_freqs.weight runs from {divisors.min()} to {factor}, not from 1 to a factor")
    frequencies = np.asarray(RotaryConfig(theta).frequencies(2 * len(divisors)))
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    ramp = (kept > 0.01) & (kept < 0.99)
    if ramp.any():
        contexts = 2 * math.pi * (low + kept[ramp] * (high - low)) / frequencies[ramp]
        rotary = RotaryConfig(theta, "llama3", factor, low, high, round(float(np.median(contexts))))
        if np.allclose(frequencies / np.asarray(rotary.frequencies(2 * len(divisors))), divisors, rtol=1e-5):
            return rotary
    raise ConversionError("rope_freqs.weight is not a llama3 scaling with low_freq_factor 1 and high_freq_factor 4")


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
    if rotary.scaling == "yarn" and (rotary.theta <= 1 or min(rotary.beta_fast, rotary.beta_slow) <= 0):
        raise ConversionError(
            f"yarn needs a rotary base above 1 and positive beta_fast and beta_slow, found {rotary.theta:g}, "
            f"{rotary.beta_fast:g} and {rotary.beta_slow:g}"
        )
    if not 0 < rotary.share <= 1:
        raise ConversionError(f"partial_rotary_factor {rotary.share:g} must be above 0 and at most 1")
    if min((*rotary.short_factors, *rotary.long_factors), default=1.0) <= 0:
        raise ConversionError("short_factor and long_factor must be positive numbers")
    return rotary


def require_factors(rotary: RotaryConfig, head_dim: int) -> None:
    """Raises a ConversionError where longrope does not have one divisor for each pair of rotated features."""
    pairs = int(head_dim * rotary.share) // 2
    for name, factors in (("short_factor", rotary.short_factors), ("long_factor", rotary.long_factors)):
        if rotary.scaling == "longrope" and len(factors) != pairs:
            raise ConversionError(
                f"{name} must have {pairs} numbers, one per pair of rotated features, not {len(factors)}"
            )
