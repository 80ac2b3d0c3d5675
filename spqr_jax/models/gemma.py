"""The Gemma 2 and Gemma 3 families (Gemma Team 2024, 2025), the latter without its images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from spqr_jax.models.attention import AttentionKind
from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder, Place
from spqr_jax.models.layers import OffsetRMSNorm
from spqr_jax.models.rotary import RotaryConfig


@dataclass(frozen=True)
class GemmaConfig(GatedConfig):
    """Sizes and options of a Gemma.

    Attributes:
      normalizes_heads: each head's queries and keys are normalized (Gemma 3).
      local_rotary: rotation in blocks with a window, where it is another (Gemma 3).
      attention_scalar: products of queries and keys are divided by its root.
      attention_cap: c of c · tanh(score / c), for the scores of the attention (Gemma 2); None for none.
      logits_cap: c of c · tanh(logit / c) (Gemma 2); None for none.
    """

    normalizes_heads: bool = True
    local_rotary: RotaryConfig | None = None
    attention_scalar: int = 256
    attention_cap: float | None = None
    logits_cap: float | None = None

    def attention(self, index: int) -> AttentionKind:
        window = self.window_of(index)
        return AttentionKind(self.rotary if window is None else self.local_rotary or self.rotary, window)

    @property
    def head_norms(self) -> Literal["each"] | None:
        return "each" if self.normalizes_heads else None


class GemmaBlock(GatedBlock):
    """h = x + norm(o(attention(q, k, v of norm(x)))); y = h + norm(down(gelu(gate(u)) · up(u))) with u = norm(h)."""

    config: GemmaConfig
    norms: ClassVar[Mapping[Place, str]] = {
        "before_attention": "input_layernorm",
        "after_attention": "post_attention_layernorm",
        "before_mlp": "pre_feedforward_layernorm",
        "after_mlp": "post_feedforward_layernorm",
    }
    norm: ClassVar[type[OffsetRMSNorm]] = OffsetRMSNorm

    def activate(self, gates: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jax.nn.gelu(gates, approximate=True)

    def attention_divisor(self) -> float:
        return math.sqrt(self.config.attention_scalar)

    def attention_cap(self) -> float | None:
        return self.config.attention_cap


class Gemma(GatedDecoder):
    """A Gemma language model in Flax."""

    config: GemmaConfig
    block: ClassVar[type[GatedBlock]] = GemmaBlock
    begins_with_bos: ClassVar[bool] = True

    def embed(
        self,
        tokens: Integer[Array | np.ndarray, "batch tokens"],
        positions: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        hidden = super().embed(tokens, positions)
        return hidden * jnp.asarray(math.sqrt(self.config.hidden_size), hidden.dtype)

    def head(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocabulary"]:
        logits, cap = super().head(hidden), self.config.logits_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
