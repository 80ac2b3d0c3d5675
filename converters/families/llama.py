"""LLaMA's checkpoints, and Mistral's, which are LLaMAs with a window."""

from typing import Any

from converters.families.gated import Fields, Gated, gated_family, read_window
from converters.formats.options import Options
from spqr_jax.models import Llama, LlamaConfig

LLAMA = gated_family(
    "llama",
    # The second is the spelling before transformers 4.28.
    ["LlamaForCausalLM", "LLaMAForCausalLM"],
    Llama,
    LlamaConfig,
    Gated(pairs=True),
    gguf="llama",
    neutral={"sliding_window": (None,)},
)


def _read(content: Options) -> Fields:
    return {"window": read_window(content)}


def _write(config: Any) -> dict[str, object]:
    return {"sliding_window": config.window}


# llama.cpp's Mistral is a LLaMA, which reads its files.
MISTRAL = gated_family(
    "mistral",
    ["MistralForCausalLM"],
    Llama,
    LlamaConfig,
    Gated(read=_read, write=_write),
    alias="mistral",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    neutral={"attention_bias": (False,), "mlp_bias": (False,)},
)
