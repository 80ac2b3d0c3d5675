"""The Qwen2 and Qwen2.5 families (Yang et al. 2024): biases on queries, keys and values; windows in later blocks."""

from dataclasses import dataclass
from typing import ClassVar

from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder


@dataclass(frozen=True)
class Qwen2Config(GatedConfig):
    """Sizes and options of a Qwen2."""

    @property
    def biased(self) -> tuple[str, ...]:
        return ("q_proj", "k_proj", "v_proj")


class Qwen2Block(GatedBlock):
    """A LLaMA's block, with biases on q, k and v."""

    config: Qwen2Config


class Qwen2(GatedDecoder):
    """A Qwen2 language model in Flax."""

    config: Qwen2Config
    block: ClassVar[type[GatedBlock]] = Qwen2Block
