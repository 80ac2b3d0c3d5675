"""The families of models whose checkpoints can be read and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters.errors import ConversionError
from converters.families import falcon, llama
from converters.formats.gguf.file import GgufFile
from converters.layout import Layout
from spqr_jax.models import Decoder, Falcon, Llama


@dataclass(frozen=True)
class Family:
    """What it takes to read and write the checkpoints of one family.

    Attributes:
      model: the Flax module, made from a configuration.
      from_huggingface: configuration from the content of `config.json`.
      to_huggingface: content of `config.json` from a configuration.
      from_gguf: configuration from a GGUF file.
      layout: the checkpoint's tensors, under the names of either project.
    """

    model: type[Decoder]
    from_huggingface: Callable[[Mapping[str, Any]], Any]
    to_huggingface: Callable[[Any], dict[str, Any]]
    from_gguf: Callable[[GgufFile], Any]
    layout: Callable[[Any, Literal["huggingface", "gguf"]], Layout]


_LLAMA = Family(Llama, llama.from_huggingface, llama.to_huggingface, llama.from_gguf, llama.layout)
_FALCON = Family(Falcon, falcon.from_huggingface, falcon.to_huggingface, falcon.from_gguf, falcon.layout)

# Keys: `model_type` of Hugging Face, which is also `general.architecture` of GGUF.
FAMILIES = {"llama": _LLAMA, "falcon": _FALCON, **dict.fromkeys(falcon.OLD_TYPES, _FALCON)}


def family_of(model: Decoder) -> Family:
    """The family that a model is of.

    Raises:
      ConversionError: it is of none of them.
    """
    for family in FAMILIES.values():
        if type(model) is family.model:
            return family
    raise ConversionError(f"A {type(model).__name__} cannot be written; supported: {', '.join(FAMILIES)}.")
