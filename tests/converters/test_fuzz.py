"""Damaged checkpoints: an error that names what is damaged, or the weights that the files have; nothing else."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from helpers.command_line import spqr
from helpers.damaged_checkpoints import CONFIG, FORMS, NEED_TORCH, TENSORS, try_damage, written
from helpers.tiny_models import write_checkpoint, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from converters import ConversionError, from_pretrained


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if form == "official" else ()) for form in FORMS]
)
def test_damage(form: str, root: Path, tmp_path: Path) -> None:
    original = written(root, form)

    @settings(max_examples=150)
    @given(seed=st.integers(0, 2**32 - 1))
    def run(seed: int) -> None:
        try_damage(original, Random(seed), tmp_path / "copy")

    run()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory is mapped where Linux tells it")
def test_neither_crash_nor_memory_nor_time(root: Path) -> None:
    forms = [form for form in FORMS if form not in NEED_TORCH or importlib.util.find_spec("torch")]
    for form in forms:
        written(root, form)
    # conftest has the cache of compiled functions.
    program = f"""if True:
        import pathlib
        import conftest
        from helpers.damaged_checkpoints import batch
        batch(pathlib.Path({str(root)!r}), {forms}, 300)
    """
    command = [sys.executable, "-X", "faulthandler", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (done.stdout[-100:], done.stderr[-4000:])


# Contradictions, one by one


def refusal(directory: Path) -> str:
    with pytest.raises(ConversionError) as raised:
        from_pretrained(directory)
    assert str(directory) in str(raised.value)
    return str(raised.value)


def past_the_matrix(arrays: dict[str, np.ndarray]) -> None:
    arrays["col_vals"][0] = arrays["col_vals"][0] & ~0xFFFF | 32


def falling(arrays: dict[str, np.ndarray]) -> None:
    arrays["row_offsets"][1] = arrays["row_offsets"][-1] + 1


def negative(arrays: dict[str, np.ndarray]) -> None:
    arrays["row_offsets"][1] = -1


def not_a_number(arrays: dict[str, np.ndarray]) -> None:
    # The first tile's scale of scales is NaN: byte 0 is in rows 0 and 1, byte 1 in rows 2 and 3, at bit 54.
    words = arrays["dense_weights"].view(np.uint64)
    words[0:4] = words[0:4] & ~np.uint64(0xFF << 54) | np.uint64(0x7E << 54)


def twice_the_same(arrays: dict[str, np.ndarray]) -> None:
    arrays["in_perm"][1] = arrays["in_perm"][0]


def too_short(arrays: dict[str, np.ndarray]) -> None:
    arrays["dense_weights"] = arrays["dense_weights"][:-1]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (past_the_matrix, "outlier in column 32, but only 32 columns"),
        (falling, "row_offsets must rise .* falls 1 times"),
        (negative, "row_offsets must rise .* falls 1 times"),
        (not_a_number, "second-level statistics of .* not finite"),
        (twice_the_same, "permutation of .* lacks 2 of 32 features"),
        (too_short, "dense_weights has the shape .63., but shapes in quantization_config says 64"),
    ],
)
def test_contradictions_in_a_packed_matrix(edit: Callable, named: str, root: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(written(root, "hf_spqr"), tmp_path / "copy")
    tensors, module = load_file(directory / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    arrays = {part: tensors[f"{module}.{part}"] for part in ("dense_weights", "row_offsets", "col_vals", "in_perm")}
    edit(arrays)
    save_file(tensors | {f"{module}.{part}": array for part, array in arrays.items()}, directory / "model.safetensors")
    message = refusal(directory)
    assert re.search(named, message)
    assert module in message
    done = spqr("eval", directory)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_a_configuration_of_another_model(form: str, option: str, root: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(written(root, form), tmp_path / "copy")
    if form.startswith("gguf"):
        other = {"hidden_size": "embedding_length", "num_attention_heads": "attention.head_count"}.get(option, option)
        write_gguf(directory / "model.gguf", CONFIG, TENSORS, metadata={f"llama.{other}": 2 * CONFIG[option]})
        message = refusal(directory / "model.gguf")
    else:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {option: 2 * config[option], "head_dim": 16}))
        message = refusal(directory)
    assert re.search(r"\.weight: expected \[.*\], found \[", message)


def test_a_tokenizer_in_which_the_library_panics(tmp_path: Path) -> None:
    """Its panics are no subclass of Exception."""
    write_checkpoint(tmp_path, CONFIG, TENSORS)
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "longer than the tokens"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert f"{tmp_path / 'tokenizer.json'} cannot be read with tokenizer_config.json: " in refusal(tmp_path)
