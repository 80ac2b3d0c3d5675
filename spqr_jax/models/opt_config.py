"""Sizes of an OPT, and the parts before and behind its blocks (Zhang et al. 2022)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spqr_jax.models.attention import AttentionKind
from spqr_jax.models.layers import LayerNorm, Linear, parameter

NORM_EPSILON = 1e-5

FIRST_POSITION = 2
"""Row of the first token in the table of positions."""


@dataclass(frozen=True)
class OptConfig:
    """Sizes and options of an OPT.

    Attributes:
      embedding_size: features of the embedding; where they are not `hidden_size`, two matrices lead in and out (350m).
      norm_first: norms are before attention and MLP, else behind the sums that they are added to (350m).
      final_norm: a norm is behind the last block.
      bias: the matrices of a block have biases.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    embedding_size: int
    norm_first: bool = True
    final_norm: bool = True
    bias: bool = True
    tie_embeddings: bool = True
    max_positions: int = 2048

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def attention(self, index: int) -> AttentionKind:
        return AttentionKind(None)


class OptEmbedding(nn.Module):
    """Embedding of tokens, a table of positions, and the matrix from the embedding's features to the model's."""

    config: OptConfig

    def setup(self) -> None:
        c = self.config
        normal, rows = nn.initializers.normal(0.02), c.max_positions + FIRST_POSITION
        self.embedding = parameter(self, "embedding", normal, (c.vocab_size, c.embedding_size))
        self.positions = self.param("positions", normal, (rows, c.hidden_size))
        if c.embedding_size != c.hidden_size:
            self.project_in = Linear(c.hidden_size)

    def enter(self, x: Float[Array, "*batch in"], positions: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """Input of the first block, from embeddings of tokens and their positions."""
        hidden = x if self.config.embedding_size == self.config.hidden_size else self.project_in(x)
        return hidden + jnp.take(self.positions, positions + FIRST_POSITION, axis=0).astype(x.dtype)


class OptOutput(nn.Module):
    """The norm behind the last block, and the matrix from the model's features to the embedding's."""

    config: OptConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch embedding"]:
        if self.config.final_norm:
            x = LayerNorm(NORM_EPSILON, name="final_layer_norm")(x)
        if self.config.hidden_size != self.config.embedding_size:
            x = Linear(self.config.embedding_size, name="project_out")(x)
        return x
