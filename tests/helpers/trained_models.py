"""Language models of about a million parameters that have learned enough for quantization to have something to lose.

Their weights are `goldens/trained_models`, which `helpers.train_models` has written.
"""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from spqr_jax.models import Decoder, Falcon, FalconConfig, Llama, LlamaConfig, RotaryConfig
from spqr_jax.texts import wikitext2

WEIGHTS = Path(__file__).parents[1] / "goldens" / "trained_models"
LENGTH = 128

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
    """A model and its trained parameters, in float32."""
    with np.load(WEIGHTS / f"{name}.npz") as arrays:
        weights = {path: array.astype(np.float32) for path, array in arrays.items()}
    return MODELS[name], unflatten_dict(weights, sep=".")
