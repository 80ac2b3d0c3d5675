"""Checkpoints of other projects, read into Flax models."""

import spqr_jax  # noqa: F401 (first: it quiets an import of transformers)
from converters.errors import ConversionError
from converters.pretrained import Pretrained, from_pretrained
from converters.smollm2 import find_smollm2

__all__ = ["ConversionError", "Pretrained", "find_smollm2", "from_pretrained"]
