"""The Falcon family: layer norm, grouped-query attention from one matrix, rotary or ALiBi (Almazrouei et al. 2023)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spqr_jax.models.decoder import Block, Context, Decoder, Stage, State
from spqr_jax.models.layers import LayerNorm, Linear, RotaryConfig, attend, extend_cache, rotate


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
        else:
            queries = rotate(queries, context.positions, c.rotary)
            keys = rotate(keys, context.positions, c.rotary)
        state, keys, values = extend_cache(state, keys, values, context.offset, context.layer)
        attended = attend(queries, keys, values, context.mask, bias, context.mesh)
        return {**state, "attention_output": attended.reshape(batch, tokens, -1)}


class Falcon(Decoder):
    """A Falcon language model in Flax."""

    config: FalconConfig
    block: ClassVar[type[Block]] = FalconBlock

    def norm_module(self) -> nn.Module:
        return LayerNorm(self.config.norm_epsilon)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x · Φ(x), exactly: not the approximation by a tanh."""
    return jax.nn.gelu(x, approximate=False)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " heads"]:
    """Amount by which each head reduces q·k per token of distance (Press et al. 2022).

    2^(−8i/n) for i = 1 … n, with n the largest power of two up to the number of heads; the heads beyond n take every
    other slope, from the first on, of the series for 2n.
    """
    n = 2 ** (num_heads.bit_length() - 1)
    first, beyond = np.arange(1, n + 1), np.arange(1, 2 * (num_heads - n), 2)
    return 2.0 ** (-8 / n * np.concatenate([first, beyond / 2]))


def alibi_bias(slot_positions: Int[Array, "batch slots"], num_heads: int) -> Float[Array, "batch heads slots"]:
    """slope · position of the key; in the softmax over a row of scores it equals −slope · distance.

    Slopes, positions and products are rounded to bfloat16, as in the code that Falcon was released with.
    """
    slopes, positions = _bfloat16(alibi_slopes(num_heads)[:, None]), _bfloat16(slot_positions[:, None, :])
    return _bfloat16(slopes * positions)


def _bfloat16(x: Array | np.ndarray) -> Array:
    """Rounds to bfloat16 but returns float32: XLA may remove a cast to bfloat16 and back."""
    return jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), exponent_bits=8, mantissa_bits=7)
