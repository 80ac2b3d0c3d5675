"""Gemma in GGUF: keys, and constants that llama.cpp has in its code."""

from dataclasses import replace

from converters.families.gated import Fields, few_blocks, read_gguf_window
from converters.formats.options import Options, number
from spqr_jax.models import RotaryConfig

GGUF_KNOWN = frozenset(
    {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa"}
)
"""Keys of a Gemma, without the architecture before them."""

_LARGEST_LAYERS = {2: 46, 3: 62}
"""Blocks of the 27B models, whose scores are divided by the root of hidden_size / heads."""


def read_gguf(generation: int, content: Options, fields: Fields) -> Fields:
    """Fields of a Gemma; windows and the divisor of scores, which the keys lack, are those of llama.cpp's code."""
    period, layers = 2 if generation == 2 else 6, fields["num_layers"]
    largest = layers == _LARGEST_LAYERS[generation]
    own: Fields = {
        "normalizes_heads": generation == 3,
        "attention_scalar": fields["hidden_size"] // fields["num_heads"] if largest else fields["head_dim"],
        "attention_cap": number(content, "attn_logit_softcapping", 50.0) if generation == 2 else None,
        "logits_cap": number(content, "final_logit_softcapping", 30.0) if generation == 2 else None,
    }
    if generation == 3:
        own["local_rotary"] = RotaryConfig(number(content, "rope.freq_base_swa", 10000.0))
        own["rotary"] = replace(fields["rotary"], theta=number(content, "rope.freq_base", 1e6))
    if (window := read_gguf_window(content)) is not None:
        own["window"] = window
        own["windowed"] = tuple((index + 1) % period != 0 for index in range(few_blocks(layers)))
    return own
