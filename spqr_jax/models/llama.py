"""The LLaMA family (Touvron et al. 2023); Mistral (Jiang et al. 2023) is one with a window."""

from dataclasses import dataclass
from typing import ClassVar

from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder


@dataclass(frozen=True)
class LlamaConfig(GatedConfig):
    """Sizes and options of a LLaMA; the defaults are those of Hugging Face's `LlamaConfig`."""


class LlamaBlock(GatedBlock):
    """h = x + o(attention(q, k, v of norm(x))); y = h + down(silu(gate(norm(h))) · up(norm(h)))."""

    config: LlamaConfig


class Llama(GatedDecoder):
    """A LLaMA language model in Flax."""

    config: LlamaConfig
    block: ClassVar[type[GatedBlock]] = LlamaBlock
