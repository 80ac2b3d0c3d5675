"""A Mistral keeps its name from conversion over quantization and saving to export; it runs as a LLaMA does."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import spqr
from helpers.tiny_models import mistral_config, random_tensors, write_checkpoint, write_gguf

from converters import export_huggingface, from_pretrained, open_pretrained
from spqr_jax import SpqrConfig, generate, load, quantize_checkpoint, save
from spqr_jax.models import Llama
from spqr_jax.storage.description import describe, describe_model

CONFIG = mistral_config(num_key_value_heads=2)
CALIBRATION = np.random.default_rng(0).integers(0, 96, (4, 32)).astype(np.int32)
# Three sequences of 24 tokens, padded on the left to different lengths.
TOKENS = np.random.default_rng(1).integers(0, 96, (3, 24)).astype(np.int32)
MASK = np.arange(24) >= np.array([[0], [7], [19]])


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral that went through a checkpoint on disk, before and after it was quantized."""
    directory = tmp_path_factory.mktemp("mistral")
    write_checkpoint(directory / "original", CONFIG, random_tensors(CONFIG))
    byte_tokenizer().save_pretrained(directory / "original")
    quantize_checkpoint(
        open_pretrained(directory / "original"), directory / "quantized", CALIBRATION, config=SpqrConfig()
    )
    return directory / "quantized"


@pytest.mark.slow
def test_the_name_is_stored(quantized: Path, tmp_path: Path) -> None:
    header = describe(quantized)
    assert (header["family"], header["alias"]) == ("llama", "mistral")
    model, params, _ = load(quantized)
    assert (type(model), model.alias) == (Llama, "mistral")
    save(tmp_path / "again", model, params)
    assert describe(tmp_path / "again")["alias"] == "mistral"
    assert "alias" not in describe_model(Llama(model.config))


@pytest.mark.slow
def test_inspect_shows_the_name(quantized: Path) -> None:
    assert "alias: mistral" in spqr("inspect", quantized).stdout
    assert "family: mistral" in spqr("inspect", quantized.parent / "original").stdout


@pytest.mark.slow
def test_transformers_runs_the_export_as_mistral(quantized: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params, tokenizer = load(quantized)
    export_huggingface(tmp_path / "out", model, params, tokenizer=tokenizer, dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] is None
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(reference) is transformers.MistralForCausalLM
    mask = torch.from_numpy(MASK.astype(np.int64))
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = reference(torch.from_numpy(TOKENS.astype(np.int64)), attention_mask=mask, position_ids=positions)
    expected = outputs.logits.numpy()[MASK]
    apply = jax.jit(model.apply)
    logits = apply({"params": params}, TOKENS, mask=MASK)
    np.testing.assert_allclose(np.asarray(logits)[MASK], expected, rtol=0, atol=1e-4)
    cache = model.init_cache(params, batch=3, slots=24)
    pieces = []
    for piece in (slice(0, 20), slice(20, 21), slice(21, 24)):
        part, cache = apply({"params": params}, TOKENS[:, piece], mask=MASK[:, piece], cache=cache)
        pieces.append(part)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[MASK], expected, rtol=0, atol=1e-4)
    prompts = [row[mask].tolist() for row, mask in zip(TOKENS, MASK, strict=True)]
    greedy = reference.generate(torch.tensor(prompts[:1]), max_new_tokens=5, do_sample=False)[0, -5:].tolist()
    assert generate(model, params, prompts, max_new_tokens=5)[0] == greedy


def test_a_gguf_file_is_a_llama(tmp_path: Path) -> None:
    """llama.cpp's converter writes a Mistral under the architecture `llama`."""
    path = write_gguf(tmp_path / "model.gguf", CONFIG, random_tensors(CONFIG))
    assert from_pretrained(path).model.alias is None
