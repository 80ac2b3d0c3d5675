"""All tokens that end a text, and the whole generation configuration: read, saved, exported, and downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.tiny_falcon import falcon_config, falcon_tensors
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint, write_gguf

from converters import ConversionError, export_huggingface, from_pretrained, open_pretrained
from spqr_jax import SpqrConfig, load, quantize_checkpoint, save
from spqr_jax.prompts import end_tokens

CONFIG = tiny_config(vocab_size=257)
TENSORS = random_tensors(CONFIG)
OWN = {
    "bos_token_id": 3,
    "eos_token_id": [5, 9],
    "temperature": 0.6,
    "do_sample": True,
    "transformers_version": "4.43.0",
}


def checkpoint(directory: Path, ends: Any = None, generation: Any = None) -> Path:
    path = write_checkpoint(directory, tiny_config(vocab_size=257, eos_token_id=ends), TENSORS)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize(
    ("ends", "generation", "expected"),
    [
        (None, None, ()),
        (5, None, (5,)),
        ([5, 9], None, (5, 9)),
        (5, {"eos_token_id": [9, 5]}, (9, 5)),
        (5, {"eos_token_id": 9}, (9, 5)),
        ([5, 9], {"temperature": 1.0}, (5, 9)),
        (None, {"eos_token_id": [5, 9]}, (5, 9)),
        (-1, None, ()),
    ],
)
def test_both_configurations_name_ends(tmp_path: Path, ends: Any, generation: Any, expected: tuple[int, ...]) -> None:
    model = from_pretrained(checkpoint(tmp_path, ends, generation)).model
    assert end_tokens(model) == expected
    tokenizer = byte_tokenizer()
    assert end_tokens(model, tokenizer) == (*expected, tokenizer.eos_token_id)


@pytest.mark.parametrize("wrong", ["5", 5.0, [5, None], {"id": 5}])
def test_ends_that_are_no_ids_are_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ConversionError, match=r"eos_token_id is .*token id") as raised:
        open_pretrained(checkpoint(tmp_path / "config", wrong))
    assert str(tmp_path / "config") in str(raised.value)
    with pytest.raises(ConversionError, match=r"eos_token_id is .*token id"):
        open_pretrained(checkpoint(tmp_path / "generation", 5, {"eos_token_id": wrong}))


def test_a_damaged_generation_configuration_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    (path / "generation_config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"generation_config\.json is not JSON"):
        open_pretrained(path)


@pytest.mark.parametrize("keys", [("eos",), ("eos", "eot"), ("eos", "eot", "eom")])
def test_ends_of_gguf(tmp_path: Path, keys: tuple[str, ...]) -> None:
    metadata = {f"tokenizer.ggml.{key}_token_id": 5 + index for index, key in enumerate(keys)}
    path = write_gguf(tmp_path / "model.gguf", CONFIG, TENSORS, metadata=metadata)
    assert end_tokens(open_pretrained(path).model) == tuple(range(5, 5 + len(keys)))


def test_the_generation_configuration_stays_whole(tmp_path: Path) -> None:
    source = open_pretrained(checkpoint(tmp_path / "model", 7, OWN))
    quantize_checkpoint(source, tmp_path / "quantized", None, config=SpqrConfig(outlier_threshold=None))
    model, params, _ = load(tmp_path / "quantized")
    save(tmp_path / "again", model, params)
    model, params, _ = load(tmp_path / "again")
    wanted = {**OWN, "eos_token_id": [5, 9, 7]}
    assert model.generation.content == wanted
    export_huggingface(tmp_path / "hf", model, params)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == wanted
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, [5, 9, 7])
    assert from_pretrained(tmp_path / "hf").model.generation == model.generation


@pytest.mark.parametrize(("ends", "written"), [(None, 256), (5, [5, 256]), ([5, 256], [5, 256]), (256, 256)])
def test_transformers_ends_an_exported_model_alike(tmp_path: Path, ends: Any, written: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, params, _ = from_pretrained(checkpoint(tmp_path / "model", ends))
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id == 256
    export_huggingface(tmp_path / "hf", model, params, tokenizer=tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert reference.generation_config.eos_token_id == written
    assert reference.config.eos_token_id == written


def test_falcon_keeps_its_ends(tmp_path: Path) -> None:
    config = falcon_config(eos_token_id=[11, 12])
    model, params, _ = from_pretrained(write_checkpoint(tmp_path / "model", config, falcon_tensors(config)))
    export_huggingface(tmp_path / "hf", model, params)
    assert end_tokens(from_pretrained(tmp_path / "hf").model) == (11, 12)


def test_an_exported_tokenizer_is_known_to_transformers_4(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    model, params, _ = from_pretrained(checkpoint(tmp_path / "model"))
    export_huggingface(tmp_path / "hf", model, params, tokenizer=tokenizer)
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    # Version 4 has no class of the new name, takes a list under the old name only, and adds inputs by default.
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<turn>"]
    assert "extra_special_tokens" not in written
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    loaded = from_pretrained(tmp_path / "hf").tokenizer
    assert loaded is not None
    assert loaded.extra_special_tokens == ["<turn>"]
    assert loaded("a<turn>b")["input_ids"] == tokenizer("a<turn>b")["input_ids"]
