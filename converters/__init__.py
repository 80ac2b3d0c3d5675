"""Reads checkpoints of other projects into Flax models, and writes checkpoints for other programs."""

import spqr_jax  # noqa: F401 (first: it quiets an import of transformers)
from converters.errors import ConversionError
from converters.export import export_hf_spqr, export_huggingface
from converters.gemma3 import find_gemma3
from converters.pretrained import Pretrained, from_pretrained, open_pretrained
from converters.smollm2 import find_smollm2

__all__ = [
    "ConversionError",
    "Pretrained",
    "export_hf_spqr",
    "export_huggingface",
    "find_gemma3",
    "find_smollm2",
    "from_pretrained",
    "open_pretrained",
]
