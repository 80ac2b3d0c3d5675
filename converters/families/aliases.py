"""Aliases: models that run as those of a family, under names, defaults and restrictions of their own."""

from dataclasses import replace

from converters.families.falcon import FALCON, read_old
from converters.families.llama import LLAMA

# Defaults of transformers' MistralConfig where LlamaConfig has others, and what Mistral does not have.
MISTRAL = replace(
    LLAMA,
    name="mistral",
    alias="mistral",
    architectures=("MistralForCausalLM",),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    neutral={**LLAMA.neutral, "attention_bias": (False,), "mlp_bias": (False,)},
    constants={"sliding_window": None},
)

# Falcon, from before transformers knew it. Exported as Falcon, so the models do not keep these names.
REFINED_WEB = replace(FALCON, name="RefinedWeb", read=read_old)
REFINED_WEB_MODEL = replace(FALCON, name="RefinedWebModel", read=read_old)
