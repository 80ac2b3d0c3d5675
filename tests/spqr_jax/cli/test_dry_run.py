"""Estimates of a run before it: sizes that are those of the run, and nothing left behind."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import result, spqr

from spqr_jax import save
from spqr_jax.cli import dry_run
from spqr_jax.cli.dry_run import Measurement
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig

CONFIG = LlamaConfig(257, 64, 128, 3, 4, 2, 16, RotaryConfig())
# Without outliers, whose number differs between blocks, all blocks of the run have the size of those measured.
OPTIONS = ("--method", "gptq", "--sequences", 4, "--sequence-length", 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dry") / "model"
    decoder = Llama(CONFIG)
    save(
        directory,
        decoder,
        decoder.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"],
        tokenizer=byte_tokenizer(),
    )
    return directory


@pytest.mark.slow
def test_sizes_are_those_of_the_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "MEASURED_TOKENS", 128)  # fewer than those of the run
    found = result("quantize", model, tmp_path / "out", *OPTIONS, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    run = result("quantize", model, tmp_path / "out", *OPTIONS)
    assert found["blocks"] == len(run["seconds_per_block"])
    for name in ("bits_per_weight", "bits_per_parameter", "parameters", "bytes_of_parameters"):
        assert found[name] == pytest.approx(run[name], rel=1e-6)
    # Of equal arrays, Orbax writes files that differ by some kilobytes from run to run.
    assert found["bytes_on_disk"] == pytest.approx(run["bytes_on_disk"], abs=15_000)
    assert found["disk_bytes"] == found["bytes_on_disk"] + 2 * 2 * 4 * 64 * 64 * 4
    assert found["memory_bytes"] > 50_000_000
    assert found["seconds"] > 3 * found["seconds_per_block"] > 0


@pytest.mark.slow
def test_round_to_nearest_has_no_states(model: Path, tmp_path: Path) -> None:
    found = result("quantize", model, tmp_path / "out", "--method", "rtn", "--dry-run")
    assert found["disk_bytes"] == found["bytes_on_disk"]
    assert list(tmp_path.iterdir()) == []


def test_seconds_of_a_run_that_is_as_its_measurement_says() -> None:
    """Each block takes 2 s of solver and 0.25 s a sequence, compiling 7 s, and reading and writing 3 s a GB."""

    def measured(blocks: int, sequences: int, size: float) -> Measurement:
        seconds = [2 + sequences / 4] * blocks
        seconds[0] += 7
        return Measurement(seconds, [9.0, *[2.0] * (blocks - 1)], 3 * size, sequences / 32, size / 10)

    expected = 7 + 30 * (2 + 32 / 4) + 3 * 10
    for blocks, sequences, size in ((2, 32, 1.0), (2, 8, 1.5), (30, 32, 10.0)):
        assert measured(blocks, sequences, size).run_seconds(30) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sequences", "length", "devices", "expected"),
    [(32, 512, 1, 32), (33, 512, 1, 32), (128, 2048, 1, 8), (4, 9000, 1, 2), (1, 20_000, 1, 1), (256, 512, 8, 32)],
)
def test_measured_sequences_are_whole_batches(sequences: int, length: int, devices: int, expected: int) -> None:
    mesh = None if devices == 1 else jax.sharding.Mesh(np.array([jax.devices()[0]] * devices), "devices")
    assert dry_run._measured_sequences(np.zeros((sequences, length), np.int32), mesh) == expected


@pytest.mark.parametrize("options", [("--near-lossless",), ("--target-bits", 4), ("--overwrite",)])
def test_errors(options: tuple, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "notes.txt").touch()
    done = spqr("quantize", model, copy, "--dry-run", *options)
    assert done.returncode == 1
    message = "holds notes.txt" if options == ("--overwrite",) else "leave out --near-lossless, --target-bits"
    assert message in done.stderr
