"""The Granite 3 family (IBM 2024): a LLaMA whose embeddings, scores, residuals and logits are multiplied."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float, Int, Integer

from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder


@dataclass(frozen=True)
class GraniteConfig(GatedConfig):
    """Sizes and options of a Granite.

    Attributes:
      embedding_multiplier: factor of embeddings.
      attention_multiplier: factor of the products of queries and keys.
      residual_multiplier: factor of what a block adds to the residual stream.
      logits_divisor: logits are divided by it.
    """

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0


class GraniteBlock(GatedBlock):
    """h = x + m · o(attention(…)); y = h + m · down(…), as a LLaMA's block but for the residual multiplier m."""

    config: GraniteConfig

    def residual_multiplier(self) -> float:
        return self.config.residual_multiplier

    def attention_divisor(self) -> float:
        return 1 / self.config.attention_multiplier


class Granite(GatedDecoder):
    """A Granite language model in Flax."""

    config: GraniteConfig
    block: ClassVar[type[GatedBlock]] = GraniteBlock

    def embed(
        self,
        tokens: Integer[Array | np.ndarray, "batch tokens"],
        positions: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        return super().embed(tokens, positions) * self.config.embedding_multiplier

    def head(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocabulary"]:
        return super().head(hidden) / self.config.logits_divisor
