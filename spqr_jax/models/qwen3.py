"""The Qwen3 family (Yang et al. 2025): each head's queries and keys are normalized before they are rotated."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder


@dataclass(frozen=True)
class Qwen3Config(GatedConfig):
    """Sizes and options of a Qwen3."""

    @property
    def head_norms(self) -> Literal["each"]:
        return "each"


class Qwen3Block(GatedBlock):
    """A LLaMA's block, with norms of queries and keys."""

    config: Qwen3Config


class Qwen3(GatedDecoder):
    """A Qwen3 language model in Flax."""

    config: Qwen3Config
    block: ClassVar[type[GatedBlock]] = Qwen3Block
