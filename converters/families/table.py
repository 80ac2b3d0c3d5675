"""The families of models whose checkpoints can be read and written, and their aliases."""

from converters.errors import ConversionError
from converters.families.base import Family
from converters.families.falcon import FALCON
from converters.families.gemma import GEMMA2, GEMMA3_TEXT
from converters.families.gemma_images import GEMMA3
from converters.families.granite import GRANITE
from converters.families.llama import LLAMA, MISTRAL
from converters.families.olmo2 import OLMO2
from converters.families.opt import OPT
from converters.families.phi3 import PHI3
from converters.families.qwen import QWEN2, QWEN3
from converters.families.qwen3_moe import QWEN3_MOE
from converters.families.refined_web import REFINED_WEB, REFINED_WEB_MODEL
from converters.families.smollm3 import SMOLLM3
from spqr_jax.models import Decoder

# One line for each family, and one for each alias.
_ALL: tuple[Family, ...] = (
    LLAMA,
    FALCON,
    MISTRAL,
    REFINED_WEB,
    REFINED_WEB_MODEL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
    GRANITE,
    OLMO2,
    PHI3,
    GEMMA3_TEXT,
    GEMMA3,
    GEMMA2,
    OPT,
)

FAMILIES = {family.name: family for family in _ALL}
"""Families and aliases by Hugging Face's `model_type`."""

GGUF_FAMILIES = {family.gguf: family for family in reversed(_ALL) if family.gguf is not None}
"""Families by GGUF's `general.architecture`; of several with one, the first."""


def family_of(model: Decoder) -> Family:
    """The family, or the alias, that a model has its name from.

    Raises:
      ConversionError: there is none.
    """
    for family in _ALL:
        if type(model) is family.model and model.alias == family.alias:
            return family
    alias = f" with the alias {model.alias!r}" if isinstance(model, Decoder) and model.alias else ""
    raise ConversionError(f"a {type(model).__name__}{alias} cannot be written, supported are {', '.join(FAMILIES)}")
