"""The text model of a Gemma 3 with images; exports are those of a text model."""

import re
from collections.abc import Mapping
from dataclasses import replace

from converters.errors import ConversionError
from converters.families.gemma import GEMMA3_TEXT
from converters.formats.options import Options
from spqr_jax.models import GemmaConfig


def _read_text(content: Options) -> GemmaConfig:
    """Configuration of the text model of a Gemma 3 with images."""
    text = content.get("text_config")
    if not isinstance(text, Mapping):
        raise ConversionError(f"text_config {text!r} is not an object; it must describe the text model")
    return GEMMA3_TEXT.from_huggingface({**text, "architectures": None})


def _text_name(name: str) -> str | None:
    """The text model's own name of a tensor, None for one of the images."""
    head = re.sub(r"^(language_model\.|model\.language_model\.)?lm_head\.", "lm_head.", name)
    text = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", head)
    return text if text != name or name.startswith("lm_head.") else None


GEMMA3 = replace(
    GEMMA3_TEXT,
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    read=_read_text,
    gguf=None,
    defaults={},
    neutral={},
    rename=_text_name,
)
