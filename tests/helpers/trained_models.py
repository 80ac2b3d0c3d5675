"""Language models of about a million parameters that have learned enough for quantization to have something to lose.

Trained on the package's text, one token per byte. What has been trained is kept in `.cache/trained`, under a name made
of everything that it depends on.
"""

import fcntl
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from spqr_jax.models import Decoder, Falcon, FalconConfig, Llama, LlamaConfig, RotaryConfig
from spqr_jax.models.stacked_blocks import stack_blocks, unstack_blocks
from spqr_jax.texts import wikitext2

CACHE = Path(__file__).parents[2] / ".cache" / "trained"
STEPS, BATCH, LENGTH = 400, 16, 128
# One compiled program trains so many steps.
CHUNK = 50
# Other programs of tests are compiled without optimization, but this one runs for long.
OPTIMIZED: dict[str, Any] = {"xla_backend_optimization_level": 3, "xla_backend_extra_options": ""}

MODELS: dict[str, Decoder] = {
    "llama": Llama(
        LlamaConfig(
            vocab_size=256,
            hidden_size=160,
            mlp_size=480,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=40,
            rotary=RotaryConfig(),
            tie_embeddings=True,
        )
    ),
    "falcon": Falcon(
        FalconConfig(
            vocab_size=256,
            hidden_size=160,
            mlp_size=640,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            arrangement="parallel_two_norms",
            rotary=RotaryConfig(),
        )
    ),
}


def byte_tokens(part: str) -> np.ndarray:
    """The bytes of the package's `valid` or `test` text."""
    return np.frombuffer(wikitext2(part).encode(), np.uint8).astype(np.int32)


def calibration_tokens() -> np.ndarray:
    """64 windows of the validation text."""
    starts = np.random.default_rng(1).integers(0, len(byte_tokens("valid")) - LENGTH, (64, 1))
    return byte_tokens("valid")[starts + np.arange(LENGTH)]


def trained(name: str) -> tuple[Decoder, dict[str, Any]]:
    """A model and its trained parameters."""
    model = MODELS[name]
    recipe = f"{model} {STEPS} {BATCH} {LENGTH} {jax.__version__}"
    path = CACHE / f"{name}-{hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()}.npz"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Tests run in several processes: one trains, the others wait for what it keeps.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            incomplete = path.with_suffix(".incomplete.npz")
            np.savez(incomplete, **flatten_dict(train(model), sep="."))
            incomplete.rename(path)
    with np.load(path) as arrays:
        return model, unflatten_dict(dict(arrays), sep=".")


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
    run = steps.lower(carry, chunks[0]).compile(compiler_options=OPTIMIZED)
    for chunk in chunks:
        carry, losses = run(carry, chunk)
        assert np.isfinite(losses).all()
    return jax.tree.map(np.asarray, unstack_blocks(carry[0]))
