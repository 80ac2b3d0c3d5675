"""A model keeps the type of its checkpoint: read, quantized, saved and exported."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.tiny_falcon import falcon_config, falcon_tensors
from helpers.tiny_models import random_tensors, tiny_config, to_bfloat16, write_checkpoint, write_gguf

from converters import export_huggingface, from_pretrained, open_pretrained
from spqr_jax import SpqrConfig, load, quantize, quantize_checkpoint, save
from spqr_jax.storage.checkpoint import describe

NAMES = ("float16", "bfloat16", "float32")
STORED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
TENSORS = random_tensors(tiny_config())


def cast(dtype: str) -> dict[str, np.ndarray]:
    return {name: tensor.astype(STORED[dtype]) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", NAMES)
def test_the_configuration_names_the_type(tmp_path: Path, key: str, dtype: str) -> None:
    path = write_checkpoint(tmp_path, tiny_config(**{key: dtype}), TENSORS)
    source = open_pretrained(path, dtype=None)
    assert source.model.dtype == dtype
    assert source.parts["norm"]()["scale"].dtype == dtype


@pytest.mark.parametrize("dtype", NAMES)
def test_without_a_name_it_is_that_of_most_weights(tmp_path: Path, dtype: str) -> None:
    # Norms are often kept in float32.
    tensors = cast(dtype) | {name: tensor for name, tensor in TENSORS.items() if "norm" in name}
    assert open_pretrained(write_checkpoint(tmp_path, tiny_config(), tensors), dtype=None).model.dtype == dtype


@pytest.mark.parametrize(
    ("kind", "weights", "activations"),
    [
        ("F32", "float32", "float32"),
        ("F16", "float16", "float16"),
        ("BF16", "bfloat16", "bfloat16"),
        ("Q8_0", "float16", "bfloat16"),
    ],
)
def test_types_of_gguf(tmp_path: Path, kind: str, weights: str, activations: str) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    source = open_pretrained(write_gguf(tmp_path / "model.gguf", tiny_config(), TENSORS, kind=stored), dtype=None)
    assert source.model.dtype == activations
    assert source.parts["embed_tokens"]()["embedding"].dtype == weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NAMES)
def test_the_type_stays_through_quantizing_saving_and_exporting(tmp_path: Path, dtype: str) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_config(), cast(dtype))
    source = open_pretrained(path, dtype=None)
    config = SpqrConfig(outlier_threshold=None)
    quantize_checkpoint(source, tmp_path / "quantized", None, config=config)
    header: Any = describe(tmp_path / "quantized")
    assert header["dtype"] == dtype
    assert {array["dtype"] for array in header["dense"].values()} == {dtype}
    model, params, _ = load(tmp_path / "quantized")
    save(tmp_path / "again", model, params)
    model, params, _ = load(tmp_path / "again")
    export_huggingface(tmp_path / "hf", model, params)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == dtype
    back = open_pretrained(tmp_path / "hf", dtype=None)
    assert back.model == model
    assert back.parts["layers_0"]()["q_proj"]["kernel"].dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_activations_beyond_float16_stay_finite(tmp_path: Path, family: str) -> None:
    """Products of the first block pass 65504 in a bfloat16 checkpoint, and so do its hidden states."""
    config = tiny_config() if family == "llama" else falcon_config()
    tensors = random_tensors(config) if family == "llama" else falcon_tensors(config)
    last = "model.layers.0.mlp.down_proj.weight" if family == "llama" else "transformer.h.0.mlp.dense_4h_to_h.weight"
    tensors[last] = tensors[last] * 1e5
    path = write_checkpoint(tmp_path / "model", config, to_bfloat16(tensors))
    model, params, _ = from_pretrained(path, dtype=None)
    tokens = np.random.default_rng(0).integers(0, 96, (4, 32)).astype(np.int32)
    hidden, _ = model.apply({"params": params}, tokens, method="hidden_states")
    assert jnp.isfinite(hidden).all()
    for layer in ("down_proj", "dense_4h_to_h"):
        if layer in params["layers_0"]:
            kernel = params["layers_0"][layer]["kernel"]
            params["layers_0"][layer]["kernel"] = np.clip(kernel.astype(np.float32), -16000, 16000).astype(kernel.dtype)
    quantized, _ = quantize(params, tokens, model=model, config=SpqrConfig(outlier_threshold=None))
    logits = model.apply({"params": quantized}, tokens)
    assert jnp.isfinite(logits).all()
    assert not jnp.isfinite(model.clone(dtype=jnp.float16).apply({"params": quantized}, tokens)).all()
