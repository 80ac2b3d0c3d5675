"""The Falcon family: layer norm, grouped-query attention from one matrix, rotary or ALiBi (Almazrouei et al. 2023)."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from spqr_jax.models.alibi import alibi_bias
from spqr_jax.models.decoder import Block, Context, Decoder, Stage, State
from spqr_jax.models.falcon_config import FalconConfig
from spqr_jax.models.layers import LayerNorm, Linear


class FalconBlock(Block):
    """y = x + attention(norm(x)) + mlp(norm(x)) in parallel; h = x + attention(norm(x)), y = h + mlp(norm(h)) else.

    mlp(x) = dense_4h_to_h(gelu(dense_h_to_4h(x))) with the exact, not the tanh, GELU. The rows of `query_key_value`
    are one group per key-value head: its query heads, then the key, then the value.
    """

    config: FalconConfig
    by_columns: ClassVar[tuple[str, ...]] = ("dense", "dense_4h_to_h")

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.config.arrangement == "sequential":
            return (
                Stage("normalize", {"attention_input": ("query_key_value",)}),
                Stage("attention", {"attention_output": ("dense",)}, restores="attention_output"),
                Stage("attention_residual", {"mlp_input": ("dense_h_to_4h",)}),
                Stage("activate", {"mlp_hidden": ("dense_4h_to_h",)}, restores="mlp_hidden"),
                Stage("mlp_residual", {}),
            )
        inputs: dict[str, tuple[str, ...]] = {"attention_input": ("query_key_value", "dense_h_to_4h")}
        if self.config.arrangement == "parallel_two_norms":
            inputs = {"attention_input": ("query_key_value",), "mlp_input": ("dense_h_to_4h",)}
        outputs = {"attention_output": ("dense",), "mlp_hidden": ("dense_4h_to_h",)}
        return (
            Stage("normalize", inputs),
            Stage("attention_and_activate", outputs, restores="mlp_hidden"),
            Stage("residual", {}),
        )

    def heads(self) -> dict[str, int]:
        return {"query_key_value": self.config.num_kv_heads}

    def setup(self) -> None:
        c = self.config
        if c.arrangement == "parallel_two_norms":
            self.ln_attn = LayerNorm(c.norm_epsilon)
            self.ln_mlp = LayerNorm(c.norm_epsilon)
        else:
            self.input_layernorm = LayerNorm(c.norm_epsilon)
        if c.arrangement == "sequential":
            self.post_attention_layernorm = LayerNorm(c.norm_epsilon)
        self.query_key_value = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.bias)
        self.dense = Linear(c.hidden_size, c.bias)
        self.dense_h_to_4h = Linear(c.mlp_size, c.bias)
        self.dense_4h_to_h = Linear(c.hidden_size, c.bias)

    def normalize(self, state: State, context: Context) -> State:
        x = state["hidden"]
        if self.config.arrangement == "parallel_two_norms":
            return {**state, "attention_input": self.ln_attn(x), "mlp_input": self.ln_mlp(x)}
        return {**state, "attention_input": self.input_layernorm(x)}

    def attention(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return self._attend(state, products["query_key_value"], context)

    def attention_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        hidden = state["hidden"] + products["dense"]
        return {**state, "hidden": hidden, "mlp_input": self.post_attention_layernorm(hidden)}

    def activate(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return {**state, "mlp_hidden": gelu(products["dense_h_to_4h"])}

    def mlp_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return {**state, "hidden": state["hidden"] + products["dense_4h_to_h"]}

    def attention_and_activate(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        state = self._attend(state, products["query_key_value"], context)
        return {**state, "mlp_hidden": gelu(products["dense_h_to_4h"])}

    def residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return {**state, "hidden": state["hidden"] + products["dense"] + products["dense_4h_to_h"]}

    def _attend(self, state: State, x: Float[Array, "batch tokens features"], context: Context) -> State:
        """Adds the attention's output to a state, from the product with `query_key_value`."""
        c = self.config
        batch, tokens, _ = x.shape
        groups = x.reshape(batch, tokens, c.num_kv_heads, -1, c.head_dim)
        queries = groups[..., :-2, :].reshape(batch, tokens, c.num_heads, c.head_dim)
        keys, values = groups[..., -2, :], groups[..., -1, :]
        bias = None
        if c.alibi:
            bias = alibi_bias(context.slot_positions, c.num_heads) / math.sqrt(c.head_dim)
        return self.attend(state, queries, keys, values, context, bias=bias)


class Falcon(Decoder):
    """A Falcon language model in Flax."""

    config: FalconConfig
    block: ClassVar[type[Block]] = FalconBlock

    def norm_module(self) -> nn.Module:
        return LayerNorm(self.config.norm_epsilon)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x · Φ(x), exactly: not the approximation by a tanh."""
    return jax.nn.gelu(x, approximate=False)
