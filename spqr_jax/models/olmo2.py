"""The OLMo 2 family (OLMo et al. 2025): norms behind attention and MLP instead of before, and of queries and keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from spqr_jax.models.gated import GatedBlock, GatedConfig, GatedDecoder, Place


@dataclass(frozen=True)
class Olmo2Config(GatedConfig):
    """Sizes and options of an OLMo 2."""

    @property
    def head_norms(self) -> Literal["all"]:
        return "all"


class Olmo2Block(GatedBlock):
    """h = x + norm(o(attention(q, k, v of x))); y = h + norm(down(silu(gate(h)) · up(h)))."""

    config: Olmo2Config
    norms: ClassVar[Mapping[Place, str]] = {
        "after_attention": "post_attention_layernorm",
        "after_mlp": "post_feedforward_layernorm",
    }


class Olmo2(GatedDecoder):
    """An OLMo 2 language model in Flax."""

    config: Olmo2Config
    block: ClassVar[type[GatedBlock]] = Olmo2Block
