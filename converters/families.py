"""The families of models whose checkpoints can be read and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters import llama
from converters.gguf_file import GgufFile
from converters.tensors import Layout
from spqr_jax.models import Decoder, Llama


@dataclass(frozen=True)
class Family:
    """What it takes to read the checkpoints of one family.

    Attributes:
      model: the Flax module, made from a configuration.
      from_huggingface: configuration from the content of `config.json`.
      from_gguf: configuration from a GGUF file.
      layout: the checkpoint's tensors, under the names of either project.
    """

    model: type[Decoder]
    from_huggingface: Callable[[Mapping[str, Any]], Any]
    from_gguf: Callable[[GgufFile], Any]
    layout: Callable[[Any, Literal["huggingface", "gguf"]], Layout]


# Keys: `model_type` of Hugging Face, which is also `general.architecture` of GGUF.
FAMILIES = {"llama": Family(Llama, llama.from_huggingface, llama.from_gguf, llama.layout)}
