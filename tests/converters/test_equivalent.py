"""Old and equivalent spellings of a checkpoint are the same model."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_falcon import falcon_config, falcon_tensors
from helpers.tiny_models import mistral_config, random_tensors, tiny_config, write_checkpoint, write_gguf

from converters import ConversionError, Pretrained, from_pretrained

Tensors = dict[str, np.ndarray]


def assert_same(found: Pretrained, expected: Pretrained) -> None:
    assert found.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize(
    "options",
    [
        {"architectures": ["LLaMAForCausalLM"]},
        {"pretraining_tp": 2},
        {"pretraining_tp": 1, "architectures": []},
        {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "torch_dtype": "float16"},
    ],
)
def test_spellings_of_llama(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = random_tensors(tiny_config())
    expected = from_pretrained(write_checkpoint(tmp_path / "plain", tiny_config(), tensors))
    assert_same(from_pretrained(write_checkpoint(tmp_path / "old", tiny_config(**options), tensors)), expected)


def test_mistral_may_have_pretraining_tp(tmp_path: Path) -> None:
    config = mistral_config(pretraining_tp=4)
    assert from_pretrained(write_checkpoint(tmp_path, config, random_tensors(config))).model.alias == "mistral"


CASES: dict[str, tuple[dict[str, Any], Any, str, str]] = {
    "llama": (tiny_config(tie_word_embeddings=True), random_tensors, "model.embed_tokens.weight", "lm_head.weight"),
    "falcon": (falcon_config(), falcon_tensors, "transformer.word_embeddings.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", CASES)
def test_a_tied_head_may_be_stored_alone(tmp_path: Path, family: str, shards: int) -> None:
    config, draw, embedding, head = CASES[family]
    tensors: Tensors = draw(config)
    expected = from_pretrained(write_checkpoint(tmp_path / "embedding", config, tensors))
    both = {**tensors, head: tensors[embedding]}
    assert_same(from_pretrained(write_checkpoint(tmp_path / "both", config, both, shards)), expected)
    alone = {name: tensor for name, tensor in both.items() if name != embedding}
    assert_same(from_pretrained(write_checkpoint(tmp_path / "head", config, alone, shards)), expected)
    with pytest.raises(ConversionError, match="other values"):
        from_pretrained(write_checkpoint(tmp_path / "other", config, both | {head: 2 * tensors[embedding]}, shards))


def test_an_untied_model_needs_both(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(ConversionError, match=r"embed_tokens\.weight: expected"):
        from_pretrained(write_checkpoint(tmp_path, tiny_config(), tensors))


def split(directory: Path, config: dict[str, Any], tensors: Tensors) -> list[Path]:
    """A GGUF file in parts, as the `gguf` package writes them."""
    directory.mkdir(exist_ok=True)
    write_gguf(
        directory / "model.gguf", config, tensors, tensors_per_part=8, metadata={"tokenizer.ggml.eos_token_id": 5}
    )
    parts = sorted(directory.glob("model-*.gguf"))
    assert len(parts) == 3
    return parts


def test_a_split_gguf_file_is_one_model(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    whole = write_gguf(tmp_path / "whole.gguf", config, tensors)
    parts = split(tmp_path / "parts", config, tensors)
    for part in parts:
        found = from_pretrained(part)
        assert_same(found, from_pretrained(whole))
        assert found.model.generation.stop_tokens == (5,)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    config = tiny_config()
    parts = split(tmp_path / "parts", config, random_tensors(config))
    renamed = shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(ConversionError, match="is one of 3 parts, so its name must end in -00001-of-00003"):
        from_pretrained(renamed)
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ConversionError, match=r"part 3 has split.no 1 and split.count 3, not 2 and 3"):
        from_pretrained(parts[0])
    parts[2].unlink()
    with pytest.raises(ConversionError, match=r"model-00003-of-00003\.gguf is missing"):
        from_pretrained(parts[0])


def test_a_hidden_state_of_early_llamas_is_ignored(tmp_path: Path) -> None:
    """Unknown options of config.json do not change a model."""
    path = write_checkpoint(tmp_path, tiny_config(), random_tensors(tiny_config()))
    content = json.loads((path / "config.json").read_text()) | {"max_sequence_length": 2048, "pad_token_id": -1}
    (path / "config.json").write_text(json.dumps(content))
    assert from_pretrained(path).model.generation.stop_tokens == ()
