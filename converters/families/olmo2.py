"""OLMo 2's checkpoints."""

from converters.families.gated import NORMS_ON_BOTH_SIDES, Gated, gated_family
from spqr_jax.models import Olmo2, Olmo2Config

_NORMS = {name: NORMS_ON_BOTH_SIDES[name] for name in ("post_attention_layernorm", "post_feedforward_layernorm")}

OLMO2 = gated_family(
    "olmo2",
    ["Olmo2ForCausalLM"],
    Olmo2,
    Olmo2Config,
    Gated(norms=_NORMS),
    gguf="olmo2",
    defaults={"rms_norm_eps": 1e-5},
    neutral={"mlp_bias": (None, False), "clip_qkv": (None,)},
)
