"""A LLaMA so small that a forward pass takes no time, with random parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.models import Llama, LlamaConfig, RotaryConfig

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary=RotaryConfig(),
    max_positions=512,
)
MODEL = Llama(CONFIG)


def tiny_params(seed: int, model: Llama = MODEL, scale: float = 0.3) -> dict[str, Any]:
    """Parameters of a model of that kind, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: scale * rng.standard_normal(leaf.shape, np.float32), shapes)


def log_probabilities(params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """log softmax of a text's logits, `[tokens, vocabulary]`, in float64."""
    logits = np.asarray(_forward(params, tokens[None])[0], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@jax.jit
def _forward(params: dict[str, Any], tokens: jax.Array) -> Any:
    return MODEL.apply({"params": params}, tokens)
