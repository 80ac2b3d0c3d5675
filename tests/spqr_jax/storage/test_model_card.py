"""Model cards of checkpoints and exports: what they say, that the hub reads them, and that nothing depends on them."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.example_names import HUB_ID, write_files
from helpers.same import assert_identical
from huggingface_hub import ModelCard

from converters import export_hf_spqr, export_huggingface, open_pretrained
from spqr_jax import SpqrConfig, load, quantize_checkpoint, save
from spqr_jax.storage.checkpoint import check_destination, describe
from spqr_jax.storage.model_card import CHECKPOINT, Origin, model_card
from spqr_jax.storage.record import read_record
from spqr_jax.storage.totals import summarize_described

TOKENS = np.random.default_rng(0).integers(0, 257, (4, 64)).astype(np.int32)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cards")
    write_files(directory)
    with contextlib.chdir(directory):
        source = open_pretrained(HUB_ID)._replace(name=HUB_ID)
        quality = {"perplexity on held-out text": 12.345}
        quantize_checkpoint(source, directory / "paper", TOKENS, config=SpqrConfig(), quality=quality)
    return directory


def card(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_quantization_says_what_it_is(root: Path) -> None:
    text = card(root / "paper")
    header = ModelCard.load(root / "paper" / "README.md").data.to_dict()
    assert header["library_name"] == "spqr-jax"
    assert (header["base_model"], header["base_model_relation"]) == (HUB_ID, "quantized")
    totals = summarize_described(describe(root / "paper"))
    for row in (
        f"| base model | {HUB_ID} |",
        f"| size | {totals.bits_per_parameter:.3f} bits per parameter: {totals.nbytes:,} bytes |",
        f"| size of these | {totals.bits_per_weight:.3f} bits per weight",
        f"{totals.weights:,} weights in 14 matrices, with 3 bits in groups of 16 |",
        "| outlier threshold | 0.2 |",
        "| calibration | 4 sequences of 64 tokens |",
        "| perplexity on held-out text | 12.35 |",
        "| mean relative squared error of the matrices' outputs on the calibration text |",
    ):
        assert row in text
    record = read_record(root / "paper")
    assert record is not None
    assert (record.base_model, record.quality) == (HUB_ID, {"perplexity on held-out text": 12.345})


def test_all_parameters_are_counted(root: Path) -> None:
    params = load(root / "tiny-dense").params
    count = sum(np.size(array) for part in params.values() for array in _leaves(part))
    assert f"| parameters | {count:,} |" in card(root / "tiny-dense")
    # Embedding and head of 257 tokens are packed in 288 rows.
    assert f"| parameters | {count + 2 * (288 - 257) * 64:,} |" in card(root / "tiny-spqr")
    assert "are not quantized" in card(root / "tiny-dense")
    assert "Settings" not in card(root / "tiny-dense")


def _leaves(tree: dict) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def test_the_card_is_the_owners(root: Path, tmp_path: Path) -> None:
    model, params, tokenizer = load(root / "tiny-spqr")
    save(tmp_path / "copy", model, params, tokenizer=tokenizer)
    assert "README.md" not in json.loads((tmp_path / "copy" / "manifest.json").read_text())
    for change in (lambda path: path.write_text("# My model"), Path.unlink):
        change(tmp_path / "copy" / "README.md")
        assert_identical(load(tmp_path / "copy").params, params)
        check_destination(tmp_path / "copy", overwrite=True)


@pytest.mark.parametrize("form", ["spqr", "hf", "hf-spqr"])
def test_the_lines_that_load_it_run(form: str, root: Path, tmp_path: Path) -> None:
    model, params, tokenizer = load(root / "paper")
    origin = Origin("somewhere", read_record(root / "paper"))
    destination = tmp_path / form
    if form == "spqr":
        save(destination, model, params, tokenizer=tokenizer, origin=origin)
    elif form == "hf":
        pytest.importorskip("torch")
        export_huggingface(destination, model, params, tokenizer=tokenizer, origin=origin)
    else:
        export_hf_spqr(destination, model, params, tokenizer=tokenizer, origin=origin)
    text = card(destination)
    assert "| base model | somewhere |" in text
    assert "base_model" not in ModelCard.load(destination / "README.md").data.to_dict()
    assert "| outlier threshold | 0.2 |" in text
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(lines.replace("path/to/this/directory", str(destination)), {})
    assert shown.getvalue().strip()


def test_names_are_text(root: Path) -> None:
    model = load(root / "tiny-dense").model
    text = model_card(model, describe(root / "tiny-dense"), CHECKPOINT, Origin("a | b\nc"))
    assert "| base model | a \\| b c |" in text
    assert "base_model" not in text
