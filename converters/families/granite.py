"""Granite's checkpoints."""

from typing import Any

from converters.errors import ConversionError
from converters.families.gated import Fields, Gated, gated_family
from converters.formats.options import Options, number
from spqr_jax.models import Granite, GraniteConfig

# Field, option of config.json, GGUF's key.
_MULTIPLIERS = (
    ("embedding_multiplier", "embedding_multiplier", "embedding_scale"),
    ("attention_multiplier", "attention_multiplier", "attention.scale"),
    ("residual_multiplier", "residual_multiplier", "residual_scale"),
    ("logits_divisor", "logits_scaling", "logit_scale"),
)


def read(content: Options) -> Fields:
    """The multipliers."""
    return _usable({field: number(content, name, 1.0) for field, name, _ in _MULTIPLIERS})


def write(config: Any) -> dict[str, object]:
    """The multipliers."""
    return {name: getattr(config, field) for field, name, _ in _MULTIPLIERS}


def read_gguf(content: Options, fields: Fields) -> Fields:
    """The multipliers; without its key, scores are divided by sqrt(head_dim)."""
    defaults = {"attention_multiplier": fields["head_dim"] ** -0.5}
    return _usable({field: number(content, key, defaults.get(field, 1.0)) for field, _, key in _MULTIPLIERS})


def _usable(fields: Fields) -> Fields:
    for field, name, _ in _MULTIPLIERS:
        if fields[field] == 0:
            raise ConversionError(f"{name} must not be 0")
    return fields


GRANITE = gated_family(
    "granite",
    ["GraniteForCausalLM"],
    Granite,
    GraniteConfig,
    Gated(
        read=read, write=write, read_gguf=read_gguf, gguf_known=frozenset(key for *_, key in _MULTIPLIERS), pairs=True
    ),
    gguf="granite",
)
