"""The SmolLM3 family (Hugging Face 2025): some blocks do not rotate queries and keys."""

from dataclasses import dataclass
from typing import ClassVar

from spqr_jax.models.attention import AttentionKind
from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder


@dataclass(frozen=True)
class SmolLM3Config(GatedConfig):
    """Sizes and options of a SmolLM3.

    Attributes:
      rotated: for each block whether it rotates queries and keys; empty where all do.
    """

    rotated: tuple[bool, ...] = ()

    def attention(self, index: int) -> AttentionKind:
        rotated = not self.rotated or self.rotated[index]
        return AttentionKind(self.rotary if rotated else None, self.window_of(index))


class SmolLM3Block(GatedBlock):
    """A LLaMA's block, with or without rotation."""

    config: SmolLM3Config


class SmolLM3(GatedDecoder):
    """A SmolLM3 language model in Flax."""

    config: SmolLM3Config
    block: ClassVar[type[GatedBlock]] = SmolLM3Block
