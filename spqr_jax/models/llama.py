"""The LLaMA family: RMS norm, rotary grouped-query attention, gated MLP (Touvron et al. 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax

from spqr_jax.models.decoder import Block, Context, Decoder, Stage, State
from spqr_jax.models.layers import Linear, RMSNorm, RotaryConfig, attend, extend_cache, rotate


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a LLaMA; the defaults are those of Hugging Face's `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryConfig
    norm_epsilon: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_positions: int = 2048


class LlamaBlock(Block):
    """h = x + o(attention(q, k, v of norm(x))); y = h + down(silu(gate(norm(h))) · up(norm(h)))."""

    config: LlamaConfig
    by_columns: ClassVar[tuple[str, ...]] = ("o_proj", "down_proj")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("normalize", {"attention_input": ("q_proj", "k_proj", "v_proj")}),
            Stage("attention", {"attention_output": ("o_proj",)}, restores="attention_output"),
            Stage("attention_residual", {"mlp_input": ("gate_proj", "up_proj")}),
            Stage("gate", {"mlp_hidden": ("down_proj",)}, restores="mlp_hidden"),
            Stage("mlp_residual", {}),
        )

    def heads(self) -> dict[str, int]:
        c = self.config
        return {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}

    def setup(self) -> None:
        c = self.config
        self.input_layernorm = RMSNorm(c.norm_epsilon)
        self.q_proj = Linear(c.num_heads * c.head_dim, c.attention_bias)
        self.k_proj = Linear(c.num_kv_heads * c.head_dim, c.attention_bias)
        self.v_proj = Linear(c.num_kv_heads * c.head_dim, c.attention_bias)
        self.o_proj = Linear(c.hidden_size, c.attention_bias)
        self.post_attention_layernorm = RMSNorm(c.norm_epsilon)
        self.gate_proj = Linear(c.mlp_size, c.mlp_bias)
        self.up_proj = Linear(c.mlp_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.mlp_bias)

    def normalize(self, state: State, context: Context) -> State:
        return {**state, "attention_input": self.input_layernorm(state["hidden"])}

    def attention(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        batch, tokens, _ = state["hidden"].shape
        queries, keys, values = (
            products[name].reshape(batch, tokens, -1, self.config.head_dim) for name in ("q_proj", "k_proj", "v_proj")
        )
        queries = rotate(queries, context.positions, self.config.rotary)
        keys = rotate(keys, context.positions, self.config.rotary)
        state, keys, values = extend_cache(state, keys, values, context.offset, context.layer)
        attended = attend(queries, keys, values, context.mask, mesh=context.mesh)
        return {**state, "attention_output": attended.reshape(batch, tokens, -1)}

    def attention_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        hidden = state["hidden"] + products["o_proj"]
        return {**state, "hidden": hidden, "mlp_input": self.post_attention_layernorm(hidden)}

    def gate(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return {**state, "mlp_hidden": jax.nn.silu(products["gate_proj"]) * products["up_proj"]}

    def mlp_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return {**state, "hidden": state["hidden"] + products["down_proj"]}


class Llama(Decoder):
    """A LLaMA language model in Flax."""

    config: LlamaConfig
    block: ClassVar[type[Block]] = LlamaBlock

    def norm_module(self) -> nn.Module:
        return RMSNorm(self.config.norm_epsilon)
