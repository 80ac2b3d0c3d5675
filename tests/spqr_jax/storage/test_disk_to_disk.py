"""From disk to disk: the bits of the in-memory run, whatever happens in between."""

import dataclasses
import errno
import itertools
import json
import os
import random
import re
import resource
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.forked import QuantizingProcess
from helpers.same import assert_identical
from helpers.tiny_falcon import STYLES, falcon_config, falcon_tensors
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint, write_gguf

from converters import from_pretrained, open_pretrained
from spqr_jax import CheckpointError, SpqrConfig, load, quantize, save
from spqr_jax.storage import partial_run
from spqr_jax.storage.checkpoint import open_checkpoint
from spqr_jax.storage.directories import remove_directory
from spqr_jax.storage.disk_to_disk import quantize_checkpoint
from spqr_jax.storage.layout import RECORD
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import BlockReport, read_record

CONFIG = SpqrConfig()
BLOCKS = 3
LLAMA = tiny_config(num_hidden_layers=BLOCKS)
TOKENS = np.random.default_rng(0).integers(0, 96, (4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("llama") / "model", LLAMA, random_tensors(LLAMA), shards=2)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def source(llama: Path) -> ModelSource:
    return open_pretrained(llama, dtype=jnp.float16)


@pytest.fixture(scope="module")
def expected(source: ModelSource) -> tuple[dict[str, Any], dict[str, Any]]:
    return quantize(source.read(), TOKENS, model=source.model, config=CONFIG)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("hidden_on_disk", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_checkpoint_is_that_of_the_run_in_memory(source, expected, tmp_path, hidden_on_disk):
    params, report = expected
    finished: list[BlockReport] = []
    reports = quantize_checkpoint(
        source, tmp_path / "out", TOKENS, config=CONFIG, hidden_on_disk=hidden_on_disk, on_block=finished.append
    )
    model, loaded, tokenizer = load(tmp_path / "out")
    assert model == source.model
    assert_identical(loaded, params)
    assert tokenizer.encode("sky") == source.tokenizer.encode("sky")
    assert names(tmp_path) == ["out"]
    assert reports == finished
    assert [block.number for block in reports] == [1, 2, 3]
    told = {name: matrix._replace(seconds=0) for block in reports for name, matrix in block.matrices.items()}
    assert told == {name: matrix._replace(seconds=0) for name, matrix in report.items()}
    record = read_record(tmp_path / "out")
    assert record is not None
    assert (record.config, record.calibration, record.blocks, record.devices) == (CONFIG, TOKENS.shape, reports, 1)


def test_a_run_that_was_stopped_leaves_the_record_of_one_that_was_not(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "whole", TOKENS, config=CONFIG)
    stopped(source, tmp_path / "out", number=2)
    quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG)

    def timeless(name: str) -> dict[str, Any]:
        content = json.loads((tmp_path / name / RECORD).read_text())
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", content.pop("date"))
        for block in content["blocks"]:
            assert block.pop("seconds") > sum(matrix.pop("seconds") for matrix in block["matrices"].values()) > 0
        return content

    assert timeless("out") == timeless("whole")


FAST, SLOW = ["gguf"], ["falcon 40B", "falcon RW", "checkpoint", "bfloat16"]
SEQUENTIAL = ("gguf", "falcon 40B")


@pytest.mark.parametrize("form", [*FAST, *(pytest.param(form, marks=pytest.mark.slow) for form in SLOW)])
def test_every_source_gives_the_bits_of_the_run_in_memory(tmp_path, form):
    path, dtype = tmp_path / "source", jnp.dtype("float16")
    if form == "gguf":
        source = open_pretrained(write_gguf(path, LLAMA, random_tensors(LLAMA)), dtype=dtype)
    elif form.startswith("falcon"):
        config = falcon_config(**STYLES[form.split()[1]])
        source = open_pretrained(write_checkpoint(path, config, falcon_tensors(config), shards=3), dtype=dtype)
    elif form == "bfloat16":
        dtype = jnp.dtype("bfloat16")
        source = open_pretrained(write_checkpoint(path, LLAMA, random_tensors(LLAMA)), dtype=dtype)
    else:
        model, params, _ = from_pretrained(write_checkpoint(tmp_path / "model", LLAMA, random_tensors(LLAMA)))
        save(path, model, params)
        source = open_checkpoint(path)
    config = CONFIG if form in SEQUENTIAL else dataclasses.replace(CONFIG, sequential=False)
    params, _ = quantize(source.read(), TOKENS, model=source.model, config=config)
    quantize_checkpoint(source, tmp_path / "out", TOKENS, config=config, hidden_on_disk=form == "bfloat16")
    assert_identical(load(tmp_path / "out").params, params)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [TOKENS[:1], None], ids=["one sequence", "round-to-nearest"])
def test_without_a_second_half_of_sequences_and_without_any(source, tmp_path, tokens):
    params, _ = quantize(source.read(), tokens, model=source.model, config=CONFIG)
    quantize_checkpoint(source, tmp_path / "out", tokens, config=CONFIG)
    assert_identical(load(tmp_path / "out").params, params)


@pytest.mark.slow
def test_no_more_than_two_blocks_are_in_memory(source, tmp_path):
    alive: list[weakref.ref] = []

    def watched(name: str) -> Any:
        part = source.parts[name]()
        if name.startswith("layers_"):
            alive.append(weakref.ref(part["down_proj"]["kernel"]))
        return part

    parts = {name: (lambda name=name: watched(name)) for name in source.parts}
    most = []

    def count(block: BlockReport) -> None:
        most.append(sum(array() is not None for array in alive))

    quantize_checkpoint(source._replace(parts=parts), tmp_path / "out", None, config=CONFIG, on_block=count)
    assert len(alive) == 2 * BLOCKS
    assert max(most) <= 2


class Stopped(Exception):
    """Raised to stop a run."""


def stop_after(number: int) -> Any:
    def on_block(block: BlockReport) -> None:
        if block.number == number:
            raise Stopped

    return on_block


def stopped(source: ModelSource, destination: Path, number: int = 1, tokens: Any = TOKENS) -> None:
    with pytest.raises(Stopped):
        quantize_checkpoint(source, destination, tokens, config=CONFIG, on_block=stop_after(number))


@pytest.mark.parametrize("hidden_on_disk", [False, True])
def test_finished_blocks_are_not_quantized_again(source, expected, tmp_path, hidden_on_disk):
    stopped(source, tmp_path / "out")
    assert names(tmp_path) == ["out.partial"]
    assert names(tmp_path / "out.partial") == ["checkpoint", "run.json", "state-1"]
    finished: list[BlockReport] = []
    reports = quantize_checkpoint(
        source, tmp_path / "out", TOKENS, config=CONFIG, hidden_on_disk=hidden_on_disk, on_block=finished.append
    )
    assert [block.number for block in finished] == [2, 3]
    assert reports[1:] == finished
    assert list(reports[0].matrices) == [f"layers_0.{m}" for m in source.model.new_block().matrices()]
    assert_identical(load(tmp_path / "out").params, expected[0])
    assert names(tmp_path) == ["out"]


def test_another_run_is_refused_and_the_difference_named(source, expected, tmp_path):
    stopped(source, tmp_path / "out")
    other_weights = random_tensors(LLAMA)
    other_weights["model.layers.2.mlp.up_proj.weight"][3, 4] += 1
    other = open_pretrained(write_checkpoint(tmp_path / "other", LLAMA, other_weights), dtype=jnp.float16)
    shallow = tiny_config()
    fewer = open_pretrained(write_checkpoint(tmp_path / "fewer", shallow, random_tensors(shallow)), dtype=jnp.float16)
    tokens = TOKENS.copy()
    tokens[2, 5] ^= 1
    for changes, message in (
        ({"config": dataclasses.replace(CONFIG, bits=4)}, "with config.bits 3, not 4: give the same"),
        ({"config": dataclasses.replace(CONFIG, damping=1.0)}, "with config.damping 0.1, not 1.0"),
        ({"source": other}, r"with source.layers_2 BLAKE2b \w+, not BLAKE2b \w+"),
        ({"source": fewer}, "with model.config.num_layers 3, not 2"),
        ({"source": open_pretrained(tmp_path / "other")}, "with model.dtype float16, not float32"),
        ({"tokens": tokens}, r"with calibration.tokens BLAKE2b \w+, not BLAKE2b \w+"),
        ({"tokens": TOKENS[:2]}, r"with calibration.shape \[4, 32\], not \[2, 32\]"),
        ({"tokens": None}, r"with calibration.shape \[4, 32\], not None"),
    ):
        given = {"source": source, "tokens": TOKENS, "config": CONFIG, **changes}
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(given["source"], tmp_path / "out", given["tokens"], config=given["config"])
    quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG)
    assert_identical(load(tmp_path / "out").params, expected[0])


def test_the_same_model_in_other_files_continues(source, expected, tmp_path):
    stopped(source, tmp_path / "out")
    same = open_pretrained(write_checkpoint(tmp_path / "same", LLAMA, random_tensors(LLAMA)), dtype=jnp.float16)
    quantize_checkpoint(same, tmp_path / "out", TOKENS, config=CONFIG)
    assert_identical(load(tmp_path / "out").params, expected[0])


@pytest.mark.slow
def test_no_second_process_works_on_a_run(source, tmp_path):
    refusals = []

    def again(block: BlockReport) -> None:
        with pytest.raises(CheckpointError, match=r"out\.partial is in use by another process: wait"):
            quantize_checkpoint(source, tmp_path / "out", None, config=CONFIG)
        refusals.append(block.number)

    quantize_checkpoint(source, tmp_path / "out", None, config=CONFIG, on_block=again)
    assert refusals == [1, 2, 3]


def test_what_is_wrong_shows_before_anything_is_written(source, tmp_path):
    weights = random_tensors(LLAMA)
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = 3e4
    bad = open_pretrained(write_checkpoint(tmp_path / "bad", LLAMA, weights), dtype=jnp.float16)
    (tmp_path / "taken").mkdir()
    (tmp_path / "foreign.partial").mkdir()
    before = names(tmp_path)
    for destination, given, tokens, message in (
        ("out", bad, TOKENS, r"layers_2\.down_proj has weights up to 3"),
        ("out", source, TOKENS + 90, "token id 1[0-9]+ is outside the vocabulary of 96"),
        ("out", source, TOKENS[:1, :8], "8 calibration tokens are too few"),
        ("taken", source, TOKENS, "taken exists already"),
        ("foreign", source, TOKENS, r"foreign\.partial is not an unfinished run, because it has no run\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_checkpoint(given, tmp_path / destination, tokens, config=CONFIG)
    assert names(tmp_path) == before


def test_a_checkpoint_is_replaced_only_when_asked_and_only_at_the_end(source, expected, tmp_path):
    save(tmp_path / "out", source.model, source.read())
    with pytest.raises(CheckpointError, match="out exists already"):
        quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG)
    with pytest.raises(Stopped):
        quantize_checkpoint(
            source, tmp_path / "out", TOKENS, config=CONFIG, overwrite=True, on_block=stop_after(BLOCKS)
        )
    assert_identical(load(tmp_path / "out").params, source.read())
    quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG, overwrite=True)
    assert_identical(load(tmp_path / "out").params, expected[0])
    assert names(tmp_path) == ["out"]


def test_a_run_stopped_just_before_and_just_after_its_checkpoint_has_its_name(source, expected, tmp_path, monkeypatch):
    def refuse(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stop(path: Path) -> None:
        if path.name == "out.partial":
            raise Stopped
        remove_directory(path)

    with monkeypatch.context() as patch:
        patch.setattr(partial_run, "publish", refuse)
        with pytest.raises(CheckpointError, match=r"written: No space left on device; .* 3 parts are finished"):
            quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG)
    assert names(tmp_path) == ["out.partial"]
    with monkeypatch.context() as patch:
        patch.setattr(partial_run, "remove_directory", stop)
        with pytest.raises(CheckpointError, match=r"out\.partial"):
            quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG)
    assert names(tmp_path) == ["out", "out.partial"]
    assert_identical(load(tmp_path / "out").params, expected[0])
    assert len(quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG)) == BLOCKS
    assert names(tmp_path) == ["out"]
    assert_identical(load(tmp_path / "out").params, expected[0])


@pytest.mark.parametrize("hidden_on_disk", [False, True])
def test_a_full_disk_is_one_error_and_what_is_finished_stays(source, expected, tmp_path, hidden_on_disk):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(block: BlockReport) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))

    message = "out.partial could not be written: File too large; [0-9]+ bytes are free and 1 parts are finished: "
    try:
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(
                source, tmp_path / "out", TOKENS, config=CONFIG, hidden_on_disk=hidden_on_disk, on_block=fill
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finished: list[BlockReport] = []
    quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG, on_block=finished.append)
    assert [block.number for block in finished] == [2, 3]
    assert_identical(load(tmp_path / "out").params, expected[0])


def unfinished(destination: Path) -> bool:
    return not destination.exists() or destination.with_name(f"{destination.name}.partial").exists()


@pytest.fixture(scope="module")
def events(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Events of a run that is not killed, and finds all programs compiled."""
    directory = tmp_path_factory.mktemp("whole")
    QuantizingProcess(llama, directory / "compiled", TOKENS).result()
    return QuantizingProcess(llama, directory / "whole", TOKENS).result()[1]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_resumes(llama, expected, events, tmp_path):
    """Killed at its first event, and in three parts of what is left to do."""
    for kill_at in (1, *[events // 3] * 3):
        assert QuantizingProcess(llama, tmp_path / "out", TOKENS, kill_at).wait() == -signal.SIGKILL
    assert QuantizingProcess(llama, tmp_path / "out", TOKENS).result()[0] == BLOCKS
    assert_identical(load(tmp_path / "out").params, expected[0])
    assert names(tmp_path) == ["out"]


@pytest.mark.slow
def test_a_run_killed_at_its_end_resumes(llama, expected, events, tmp_path):
    """The last events are those after the checkpoint has got its name.

    Runs have not quite as many events each: some end before they would be killed among the last.
    """
    kills = 0
    for kill_at in range(events - 20, events, 6):
        destination = tmp_path / f"out-{kill_at}"
        status = QuantizingProcess(llama, destination, TOKENS, kill_at).wait()
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if unfinished(destination):
            assert QuantizingProcess(llama, destination, TOKENS).result()[0] == BLOCKS
        assert not (tmp_path / f"{destination.name}.partial").exists()
        assert_identical(load(destination).params, expected[0])
    assert kills > 1


@pytest.mark.slow
def test_a_run_killed_at_random_moments_again_and_again_ends_with_the_same_bits(llama, expected, events, tmp_path):
    started = time.monotonic()
    QuantizingProcess(llama, tmp_path / "whole", TOKENS).result()
    whole = time.monotonic() - started
    moments = random.Random(0)
    kills = 0
    for attempt in itertools.count():
        destination = tmp_path / f"out-{attempt}"
        for _ in range(2):
            if unfinished(destination):
                process = QuantizingProcess(llama, destination, TOKENS)
                if process.wait(moments.uniform(0.2, 1) * whole) is None:
                    kills += process.kill() == -signal.SIGKILL
        if unfinished(destination):
            QuantizingProcess(llama, destination, TOKENS).result()
        assert_identical(load(destination).params, expected[0])
        if kills >= 3:
            break
