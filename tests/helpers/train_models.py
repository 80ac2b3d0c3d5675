"""Trains the models of `helpers.trained_models` on the package's text, one token per byte.

Run `PYTHONPATH=tests python -m helpers.train_models`.
400 steps of 16 windows take two minutes each; after fewer, SpQR, GPTQ and round-to-nearest differ too little.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from helpers.trained_models import LENGTH, MODELS, WEIGHTS, byte_tokens

from spqr_jax.models import Decoder
from spqr_jax.models.stacked_blocks import stack_blocks, unstack_blocks

STEPS, BATCH = 400, 16
# One compiled program trains so many steps.
CHUNK = 50


def train(model: Decoder) -> dict[str, Any]:
    """Parameters after STEPS steps of AdamW on random windows of the validation text."""
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = stack_blocks(params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, STEPS // 10, STEPS, 1e-4)
    optimizer = optax.adamw(schedule, weight_decay=0.1)

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def step(carry: Any, windows: jax.Array) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    text, rng = byte_tokens("valid"), np.random.default_rng(0)
    starts = rng.integers(0, len(text) - LENGTH, (STEPS // CHUNK, CHUNK, BATCH, 1))
    chunks = text[starts + np.arange(LENGTH + 1)]
    carry = params, optimizer.init(params)
    steps = jax.jit(lambda carry, chunk: jax.lax.scan(step, carry, chunk))
    for chunk in chunks:
        carry, losses = steps(carry, chunk)
        assert np.isfinite(losses).all()
    return jax.tree.map(np.asarray, unstack_blocks(carry[0]))


if __name__ == "__main__":
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    for name, model in MODELS.items():
        params = flatten_dict(train(model), sep=".")
        np.savez_compressed(WEIGHTS / f"{name}.npz", **{path: leaf.astype(np.float16) for path, leaf in params.items()})
