"""The base of LLaMA-like families: RMS norms, rotary grouped-query attention, and an MLP with a gate.

A family sets what differs: which norms there are, matrices, biases, the activation, multipliers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from spqr_jax.models.attention import AttentionKind
from spqr_jax.models.decoder import Block, Context, Decoder, Stage, State
from spqr_jax.models.experts import ExpertsLinear
from spqr_jax.models.layers import Linear, OffsetRMSNorm, RMSNorm
from spqr_jax.models.optional import optional
from spqr_jax.models.rotary import RotaryConfig

Place = Literal["before_attention", "after_attention", "before_mlp", "after_mlp"]
"""Where a block has a norm: of an input of matrices, or of a product before it is added."""


@dataclass(frozen=True)
class GatedConfig:
    """Sizes and options of a model with a gated MLP.

    Attributes:
      mlp_size: features between the matrices of the MLP.
      rotary: rotation of queries and keys.
      attention_bias: the matrices of the attention have biases.
      mlp_bias: the matrices of the MLP have biases.
      window: last tokens that a token attends to, itself included, in blocks that have a window; None for all.
      windowed: for each block whether it has the window; empty where all have.
    """

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
    window: int | None = optional(None)
    windowed: tuple[bool, ...] = optional(())

    def attention(self, index: int) -> AttentionKind:
        """How a block attends."""
        return AttentionKind(self.rotary, self.window_of(index))

    def window_of(self, index: int) -> int | None:
        """The window of a block."""
        return self.window if not self.windowed or self.windowed[index] else None

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """Shape `(out, in)` of each matrix of a block."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_proj": (self.mlp_size, self.hidden_size),
            "up_proj": (self.mlp_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.mlp_size),
        }

    @property
    def stacks(self) -> Mapping[str, int]:
        """The number of experts, for each matrix that every expert has."""
        return {}

    @property
    def biased(self) -> tuple[str, ...]:
        """Names of the matrices that have a bias."""
        in_mlp = ("gate_proj", "up_proj", "down_proj", "router")
        return tuple(name for name in self.matrices if (self.mlp_bias if name in in_mlp else self.attention_bias))

    @property
    def head_norms(self) -> Literal["each", "all"] | None:
        """Queries and keys are normalized: `each` head by itself, or `all` heads together."""
        return None


class GatedBlock(Block):
    """h = x + m · o(attention(q, k, v of norm(x))); y = h + m · down(act(gate(u)) · up(u)) with u = norm(h).

    With norms after attention and MLP, those products are normalized before they are added.
    """

    config: GatedConfig
    by_columns: ClassVar[tuple[str, ...]] = ("o_proj", "down_proj")
    norms: ClassVar[Mapping[Place, str]] = {
        "before_attention": "input_layernorm",
        "before_mlp": "post_attention_layernorm",
    }
    """Names of the norms."""
    norm: ClassVar[type[RMSNorm | OffsetRMSNorm]] = RMSNorm
    """Module of the norms."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        attention = None if "after_attention" in self.norms else "attention_output"
        mlp = None if "after_mlp" in self.norms else "mlp_hidden"
        multiplier = self.residual_multiplier()
        return (
            Stage("normalize", {"attention_input": self.attention_matrices()}),
            Stage("attention", {"attention_output": ("o_proj",)}, attention, multiplier),
            Stage("attention_residual", {"mlp_input": self.mlp_matrices()}),
            Stage("gate", {"mlp_hidden": ("down_proj",)}, mlp, multiplier),
            Stage("mlp_residual", {}),
        )

    def attention_matrices(self) -> tuple[str, ...]:
        """The matrices that make queries, keys and values."""
        return ("q_proj", "k_proj", "v_proj")

    def mlp_matrices(self) -> tuple[str, ...]:
        """The matrices that make gates and what they gate."""
        return ("gate_proj", "up_proj")

    def residual_multiplier(self) -> float:
        """m, the factor of what is added to the residual stream."""
        return 1.0

    def attention_divisor(self) -> float | None:
        """Divisor of the products of queries and keys; None for sqrt(head_dim)."""
        return None

    def attention_cap(self) -> float | None:
        """Cap of the scores, see `attention.attend`."""
        return None

    def activate(self, gates: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The activation of the gates."""
        return jax.nn.silu(gates)

    def experts(self) -> Mapping[str, int]:
        return self.config.stacks

    def heads(self) -> dict[str, int]:
        c = self.config
        return {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}

    def setup(self) -> None:
        for name, (out, _) in self.config.matrices.items():
            experts = self.config.stacks.get(name)
            layer = Linear(out, name in self.config.biased) if experts is None else ExpertsLinear(experts, out)
            setattr(self, name, layer)
        for name in self.norms.values():
            setattr(self, name, self.norm(self.config.norm_epsilon))
        if self.config.head_norms is not None:
            self.q_norm = self.norm(self.config.norm_epsilon)
            self.k_norm = self.norm(self.config.norm_epsilon)

    def normalized(self, place: Place, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens hidden"]:
        """The norm at a place, if there is one."""
        return getattr(self, self.norms[place])(x) if place in self.norms else x

    def added(self, state: State, place: Place, product: Float[Array, "batch tokens hidden"]) -> State:
        """Adds a product, normalized as at its place, to the residual stream."""
        multiplier = self.residual_multiplier()
        product = self.normalized(place, product)
        return {**state, "hidden": state["hidden"] + (product if multiplier == 1.0 else product * multiplier)}

    def normalize(self, state: State, context: Context) -> State:
        return {**state, "attention_input": self.normalized("before_attention", state["hidden"])}

    def attention(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        queries, keys, values = self.queries_keys_values(products)
        if self.config.head_norms == "all":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys, values = (x.reshape(*x.shape[:2], -1, self.config.head_dim) for x in (queries, keys, values))
        if self.config.head_norms == "each":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        divisor, cap = self.attention_divisor(), self.attention_cap()
        return self.attend(state, queries, keys, values, context, divisor=divisor, cap=cap)

    def queries_keys_values(self, products: State) -> tuple[Array, Array, Array]:
        """Queries, keys and values `[batch, tokens, heads · head_dim]` from products."""
        return products["q_proj"], products["k_proj"], products["v_proj"]

    def attention_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        state = self.added(state, "after_attention", products["o_proj"])
        return {**state, "mlp_input": self.normalized("before_mlp", state["hidden"])}

    def gate(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        gates, values = self.gates_and_values(products)
        return {**state, "mlp_hidden": self.activate(gates) * values}

    def gates_and_values(self, products: State) -> tuple[Array, Array]:
        """Gates and what they gate, from products."""
        return products["gate_proj"], products["up_proj"]

    def mlp_residual(self, state: State, context: Context) -> State:
        state, products = self.project(state)
        return self.added(state, "after_mlp", products["down_proj"])


class GatedDecoder(Decoder):
    """A language model with gated blocks; its last norm is one like theirs."""

    config: GatedConfig
    block: ClassVar[type[GatedBlock]] = GatedBlock

    def norm_module(self) -> nn.Module:
        return self.block.norm(self.config.norm_epsilon)
