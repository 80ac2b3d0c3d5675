"""A small Qwen3-MoE."""

from spqr_jax.models import Qwen3Moe, Qwen3MoeConfig, RotaryConfig


def tiny_experts(experts: int) -> Qwen3Moe:
    """The model with so many experts, each token going to two of them."""
    return Qwen3Moe(
        Qwen3MoeConfig(
            vocab_size=61,
            hidden_size=64,
            mlp_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rotary=RotaryConfig(),
            experts=experts,
            experts_per_token=2,
        )
    )
