"""Flax models that run from dense or packed weights."""

from spqr_jax.models.attention import AttentionKind
from spqr_jax.models.decoder import Block, Context, Decoder, KVCache, Stage, layer_name, make_context
from spqr_jax.models.falcon import Falcon
from spqr_jax.models.falcon_config import FalconConfig
from spqr_jax.models.fusion import fuse_projections
from spqr_jax.models.gemma import Gemma, GemmaConfig
from spqr_jax.models.granite import Granite, GraniteConfig
from spqr_jax.models.llama import Llama, LlamaConfig
from spqr_jax.models.model_config import ModelConfig
from spqr_jax.models.olmo2 import Olmo2, Olmo2Config
from spqr_jax.models.opt import Opt
from spqr_jax.models.opt_config import OptConfig
from spqr_jax.models.phi3 import Phi3, Phi3Config
from spqr_jax.models.qwen2 import Qwen2, Qwen2Config
from spqr_jax.models.qwen3 import Qwen3, Qwen3Config
from spqr_jax.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from spqr_jax.models.rotary import RotaryConfig
from spqr_jax.models.smollm3 import SmolLM3, SmolLM3Config
from spqr_jax.models.tensor_parallel import shard_params

FAMILIES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "falcon": Falcon,
    "gemma": Gemma,
    "granite": Granite,
    "olmo2": Olmo2,
    "opt": Opt,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
    "smollm3": SmolLM3,
}
"""Name of each family in `spqr.json`, and its module."""

__all__ = [
    "FAMILIES",
    "AttentionKind",
    "Block",
    "Context",
    "Decoder",
    "Falcon",
    "FalconConfig",
    "Gemma",
    "GemmaConfig",
    "Granite",
    "GraniteConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "Olmo2",
    "Olmo2Config",
    "Opt",
    "OptConfig",
    "Phi3",
    "Phi3Config",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Moe",
    "Qwen3MoeConfig",
    "RotaryConfig",
    "SmolLM3",
    "SmolLM3Config",
    "Stage",
    "fuse_projections",
    "layer_name",
    "make_context",
    "shard_params",
]
