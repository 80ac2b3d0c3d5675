"""The Qwen3-MoE family (Yang et al. 2025): a Qwen3 whose MLPs are mixtures of experts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp

from spqr_jax.models.decoder import Context, Stage, State
from spqr_jax.models.experts import route
from spqr_jax.models.gated import GatedBlock, GatedDecoder
from spqr_jax.models.qwen3 import Qwen3Config

OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""The matrices that every expert has."""


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Sizes and options of a Qwen3-MoE; `mlp_size` is that of one expert.

    Attributes:
      experts: their number.
      experts_per_token: how many of them a token goes to.
      normalize_weights: the weights of a token's experts sum to 1.
    """

    experts: int = 128
    experts_per_token: int = 8
    normalize_weights: bool = False

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        return {**super().matrices, "router": (self.experts, self.hidden_size)}

    @property
    def stacks(self) -> Mapping[str, int]:
        return dict.fromkeys(OF_EXPERTS, self.experts)


class Qwen3MoeBlock(GatedBlock):
    """h = x + o(attention(q, k, v of norm(x))); y = h + Σ_e p_e · down_e(silu(gate_e(u)) · up_e(u)) with u = norm(h).

    The sum is over the likeliest experts of each token, and p is the softmax of router(u). The input of `down_e` is
    multiplied by p_e, instead of its product: the Hessian then weighs a token as the sum does.
    """

    config: Qwen3MoeConfig

    @property
    def stages(self) -> tuple[Stage, ...]:
        *others, residual, gate, last = super().stages
        # Several experts add to one token; each would correct the same error.
        return (
            *others,
            replace(residual, routed_by="experts"),
            replace(gate, routed_by="experts", restores=None),
            last,
        )

    def attention_residual(self, state: State, context: Context) -> State:
        state = super().attention_residual(state, context)
        count, normalize = self.config.experts_per_token, self.config.normalize_weights
        experts, weights = route(self.router(state["mlp_input"]), count, normalize=normalize)
        return {**state, "experts": experts, "expert_weights": weights}

    def gate(self, state: State, context: Context) -> State:
        state = super().gate(state, context)
        weights = state.pop("expert_weights").astype(state["mlp_hidden"].dtype)
        return {**state, "mlp_hidden": state["mlp_hidden"] * weights[..., None]}

    def mlp_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        state.pop("experts")
        return self.added(state, "after_mlp", jnp.sum(products["down_proj"], axis=-2))


class Qwen3Moe(GatedDecoder):
    """A Qwen3-MoE language model in Flax."""

    config: Qwen3MoeConfig
    block: ClassVar[type[GatedBlock]] = Qwen3MoeBlock
