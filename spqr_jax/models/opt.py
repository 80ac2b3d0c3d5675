"""The OPT family (Zhang et al. 2022): learned positions, layer norms, biases, a ReLU between two matrices."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from spqr_jax.models.decoder import Block, Context, Decoder, Stage, State
from spqr_jax.models.layers import LayerNorm, Linear
from spqr_jax.models.opt_config import NORM_EPSILON, OptConfig, OptEmbedding, OptOutput


class OptBlock(Block):
    """h = x + out_proj(attention(norm(x))); y = h + fc2(relu(fc1(norm(h)))). Norms behind the sums in 350m."""

    config: OptConfig
    by_columns: ClassVar[tuple[str, ...]] = ("out_proj", "fc2")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("normalize", {"attention_input": ("q_proj", "k_proj", "v_proj")}),
            Stage("attention", {"attention_output": ("out_proj",)}, restores="attention_output"),
            Stage("attention_residual", {"mlp_input": ("fc1",)}),
            Stage("activate", {"mlp_hidden": ("fc2",)}, restores="mlp_hidden"),
            Stage("mlp_residual", {}),
        )

    def heads(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj"), self.config.num_heads)

    def setup(self) -> None:
        c = self.config
        self.self_attn_layer_norm = LayerNorm(NORM_EPSILON)
        self.q_proj = Linear(c.hidden_size, c.bias)
        self.k_proj = Linear(c.hidden_size, c.bias)
        self.v_proj = Linear(c.hidden_size, c.bias)
        self.out_proj = Linear(c.hidden_size, c.bias)
        self.final_layer_norm = LayerNorm(NORM_EPSILON)
        self.fc1 = Linear(c.mlp_size, c.bias)
        self.fc2 = Linear(c.hidden_size, c.bias)

    def normalize(self, state: State, context: Context) -> State:
        x = state["hidden"]
        return {**state, "attention_input": self.self_attn_layer_norm(x) if self.config.norm_first else x}

    def attention(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        queries, keys, values = (
            products[name].reshape(*products[name].shape[:2], -1, self.config.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return self.attend(state, queries, keys, values, context)

    def attention_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        hidden = state["hidden"] + products["out_proj"]
        if self.config.norm_first:
            return {**state, "hidden": hidden, "mlp_input": self.final_layer_norm(hidden)}
        hidden = self.self_attn_layer_norm(hidden)
        return {**state, "hidden": hidden, "mlp_input": hidden}

    def activate(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return {**state, "mlp_hidden": jax.nn.relu(products["fc1"])}

    def mlp_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        hidden = state["hidden"] + products["fc2"]
        return {**state, "hidden": hidden if self.config.norm_first else self.final_layer_norm(hidden)}


class Opt(Decoder):
    """An OPT language model in Flax."""

    config: OptConfig
    block: ClassVar[type[Block]] = OptBlock

    def embedding_module(self) -> OptEmbedding:
        return OptEmbedding(self.config)

    def norm_module(self) -> OptOutput:
        return OptOutput(self.config)

    def embed(
        self,
        tokens: Integer[Array | np.ndarray, "batch tokens"],
        positions: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.embed_tokens.enter(super().embed(tokens, positions), positions)
