"""Flax models that run from dense or packed weights."""

from spqr_jax.models.decoder import Block, Context, Decoder, KVCache, Stage, layer_name, make_context
from spqr_jax.models.falcon import Falcon, FalconConfig
from spqr_jax.models.fusion import fuse_projections
from spqr_jax.models.layers import RotaryConfig
from spqr_jax.models.llama import Llama, LlamaConfig
from spqr_jax.models.model_config import ModelConfig
from spqr_jax.models.tensor_parallel import shard_params

FAMILIES: dict[str, type[Decoder]] = {"llama": Llama, "falcon": Falcon}
"""Name of each family, as Hugging Face's `model_type`, and its module."""

__all__ = [
    "FAMILIES",
    "Block",
    "Context",
    "Decoder",
    "Falcon",
    "FalconConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "RotaryConfig",
    "Stage",
    "fuse_projections",
    "layer_name",
    "make_context",
    "shard_params",
]
