"""Names that the examples in docstrings may use without importing them, and the files that they read.

Each example runs in a directory with the checkpoints `tiny-dense` and `tiny-spqr`, and with a Hugging Face checkpoint
under the path `HuggingFaceTB/SmolLM2-135M`, which stands for that repository of the hub.
"""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers.byte_tokenizer import byte_tokenizer
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint

import converters
import pallas_kernels
import spqr_jax

HUB_ID = "HuggingFaceTB/SmolLM2-135M"


def write_files(directory: Path) -> None:
    """Writes the checkpoints that examples read."""
    config = tiny_config(vocab_size=257, num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    write_checkpoint(directory / HUB_ID, config, random_tensors(config))
    byte_tokenizer().save_pretrained(directory / HUB_ID)
    model, params, tokenizer = converters.from_pretrained(directory / HUB_ID)
    spqr_jax.save(directory / "tiny-dense", model, params, tokenizer=tokenizer)
    source = spqr_jax.open_checkpoint(directory / "tiny-dense")
    spqr_jax.quantize_checkpoint(source, directory / "tiny-spqr", _calibration(), config=spqr_jax.COMPACT)


def names(directory: Path) -> dict[str, Any]:
    """The names, over the checkpoints in a directory."""
    model, params, tokenizer = spqr_jax.load(directory / "tiny-dense")
    quantized = spqr_jax.load(directory / "tiny-spqr").params
    kernel = params["layers_0"]["q_proj"]["kernel"]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, len(kernel)), np.float32))
    public = {name: getattr(package, name) for package in (pallas_kernels, spqr_jax) for name in package.__all__}
    return {
        **public,
        **{name: getattr(converters, name) for name in converters.__all__},
        **{"Path": Path, "functools": functools, "jax": jax, "jnp": jnp, "json": json, "math": math, "np": np},
        "replace": replace,
        "model": model,
        "params": params,
        "quantized": quantized,
        "tokenizer": tokenizer,
        "source": spqr_jax.open_checkpoint(directory / "tiny-dense"),
        "calibration": _calibration(),
        "text": "The sky is blue, and the sea is green. " * 40,
        "kernel": kernel,
        "weight": kernel.T,
        "x": x,
        "hessian": x.T @ x,
        "packed": quantized["layers_0"]["q_proj"]["kernel"],
    }


def _calibration() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, (4, 64)).astype(np.int32)
