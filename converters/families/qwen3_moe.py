"""The checkpoints of Qwen3-MoE, whose every block has experts."""

from typing import Any

from converters.errors import ConversionError
from converters.families.gated import Fields, Gated, gated_family, read_window
from converters.formats.options import Options, flag, size
from spqr_jax.models import Qwen3Moe, Qwen3MoeConfig


def read(content: Options) -> Fields:
    """The experts, and the window of all blocks, if it is used.

    Raises:
      ConversionError: a size is not a positive integer, or a token would go to more experts than there are.
    """
    number = "num_local_experts" if "num_local_experts" in content else "num_experts"
    return {
        **_experts(size(content, number, 128), size(content, "num_experts_per_tok", 8)),
        "mlp_size": size(content, "moe_intermediate_size", 768),
        "normalize_weights": flag(content, "norm_topk_prob", False),
        "window": read_window(content) if flag(content, "use_sliding_window", False) else None,
    }


def write(config: Any) -> dict[str, object]:
    """The experts and the window, inverse of `read`."""
    return {
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.mlp_size,
        "norm_topk_prob": config.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


def read_gguf(content: Options, fields: Fields) -> Fields:
    """The experts; llama.cpp always normalizes their weights."""
    return {
        **_experts(size(content, "expert_count"), size(content, "expert_used_count")),
        "mlp_size": size(content, "expert_feed_forward_length"),
        "normalize_weights": True,
    }


def _experts(count: int, per_token: int) -> Fields:
    if per_token > count:
        raise ConversionError(f"each token goes to {per_token} experts, but there are {count}: give at most {count}")
    return {"experts": count, "experts_per_token": per_token}


QWEN3_MOE = gated_family(
    "qwen3_moe",
    ["Qwen3MoeForCausalLM"],
    Qwen3Moe,
    Qwen3MoeConfig,
    Gated(
        read=read,
        write=write,
        read_gguf=read_gguf,
        gguf_known=frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"}),
    ),
    gguf="qwen3moe",
    defaults={
        "intermediate_size": 6144,  # of blocks without experts, which are not supported
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    neutral={"mlp_bias": (None, False), "decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])},
)
