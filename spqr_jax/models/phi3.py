"""The Phi-3 and Phi-4-mini families (Abdin et al. 2024): one matrix makes q, k and v, another gates and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from spqr_jax.models.decoder import State
from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder


@dataclass(frozen=True)
class Phi3Config(GatedConfig):
    """Sizes and options of a Phi-3."""

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv_proj": (queries + 2 * keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_up_proj": (2 * self.mlp_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.mlp_size),
        }


class Phi3Block(GatedBlock):
    """A LLaMA's block with two fused matrices, their rows in the order q, k, v, and gates, values."""

    config: Phi3Config

    def attention_matrices(self) -> tuple[str, ...]:
        return ("qkv_proj",)

    def mlp_matrices(self) -> tuple[str, ...]:
        return ("gate_up_proj",)

    def heads(self) -> dict[str, int]:
        # A share of the rows of the fused matrix is no share of the heads: whoever splits it may split anywhere.
        return {}

    def queries_keys_values(self, products: State) -> tuple[Array, Array, Array]:
        queries, keys = self.config.num_heads * self.config.head_dim, self.config.num_kv_heads * self.config.head_dim
        q, k, v = jnp.split(products["qkv_proj"], [queries, queries + keys], axis=-1)
        return q, k, v

    def gates_and_values(self, products: State) -> tuple[Array, Array]:
        gates, values = jnp.split(products["gate_up_proj"], 2, axis=-1)
        return gates, values


class Phi3(GatedDecoder):
    """A Phi-3 language model in Flax."""

    config: Phi3Config
    block: ClassVar[type[GatedBlock]] = Phi3Block
