"""Sizes and options of a Falcon (Almazrouei et al. 2023)."""

from dataclasses import dataclass
from typing import Literal

from spqr_jax.models.attention import AttentionKind
from spqr_jax.models.rotary import RotaryConfig


@dataclass(frozen=True)
class FalconConfig:
    """Sizes and options of a Falcon.

    Attributes:
      num_kv_heads: key-value heads; 1 is multi-query attention (7B), `num_heads` is plain attention (RW).
      arrangement: `sequential` runs the MLP after the attention, each with a norm of its own (RW); `parallel` runs both
        on one norm's output (7B, 11B), `parallel_two_norms` on that of a norm each (40B, 180B).
      alibi: attention is biased by position instead of rotated, and `rotary` has no meaning (RW).
      bias: the four matrices of a block have biases.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    arrangement: Literal["sequential", "parallel", "parallel_two_norms"]
    rotary: RotaryConfig
    alibi: bool = False
    bias: bool = False
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def attention(self, index: int) -> AttentionKind:
        return AttentionKind(None if self.alibi else self.rotary)
