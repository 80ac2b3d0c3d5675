"""`spqr quantize --distributed`: two processes of two devices each, over the loopback interface."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import spqr
from helpers.same import assert_identical
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint
from helpers.virtual_devices import environment

from spqr_jax import load

pytestmark = pytest.mark.slow
Start = Callable[..., list[subprocess.Popen[str]]]
BLOCKS = 3


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the command, but for its destination."""
    directory = tmp_path_factory.mktemp("source")
    config = tiny_config(num_hidden_layers=BLOCKS, vocab_size=300)
    source = write_checkpoint(directory / "model", config, random_tensors(config))
    byte_tokenizer().save_pretrained(source)
    (directory / "text").write_text("The sky is blue, and the sea is green. " * 200)
    options = ["--calibration", str(directory / "text"), "--sequences", "8", "--sequence-length", "32", "--json"]
    return [str(source), *options, "--preset", "paper"]


@pytest.fixture(scope="module")
def start(arguments: list[str]) -> Start:
    """Starts the command in two processes of two devices each, with options of its own each."""

    def run(destination: Path, *options: tuple[str, ...]) -> list[subprocess.Popen[str]]:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        started = []
        for index in range(2):
            variables = {
                **environment(devices=2),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            command = [sys.executable, "-m", "spqr_jax.cli", "quantize", *arguments, str(destination)]
            command += ["--distributed", *(options[index] if options else ())]
            started.append(
                subprocess.Popen(
                    command,
                    env=variables,
                    cwd=Path(__file__).parents[3],
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        return started

    return run


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes, on one device."""
    destination = tmp_path_factory.mktemp("alone") / "out"
    done = spqr("quantize", *arguments, destination)
    assert done.returncode == 0, done.stderr
    return destination


def test_two_processes_write_what_one_writes(start: Start, alone: Path, tmp_path: Path) -> None:
    processes = start(tmp_path / "out")
    (result, log), (silence, no_log) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0], log + no_log
    assert len(json.loads(result)["seconds_per_block"]) == BLOCKS
    assert silence == ""
    assert "block 3 of 3" in log
    assert "block 3 of 3" not in no_log
    assert_identical(load(tmp_path / "out").params, load(alone).params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def wait_for_state(directory: Path, blocks: int, processes: list[subprocess.Popen[str]]) -> None:
    """Until so many blocks are done."""
    while not any((directory / f"state-{done}").exists() for done in range(blocks, BLOCKS + 1)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(start: Start, alone: Path, tmp_path: Path) -> None:
    for victim, done in ((0, 1), (1, 2)):
        processes = start(tmp_path / "out")
        wait_for_state(tmp_path / "out.partial", done, processes)
        processes[victim].send_signal(signal.SIGKILL)
        survivor = processes[1 - victim]
        _, complaint = survivor.communicate(timeout=60)
        assert survivor.returncode != 0
        assert complaint.strip()
        processes[victim].communicate()
        assert not (tmp_path / "out").exists()
    again = start(tmp_path / "out")
    (result, log), _ = (process.communicate() for process in again)
    assert again[0].returncode == 0, log
    assert len(json.loads(result)["seconds_per_block"]) == BLOCKS
    assert "block 2 of 3" not in log
    assert_identical(load(tmp_path / "out").params, load(alone).params)


def test_processes_that_are_not_to_do_the_same_end_with_the_difference(start: Start, tmp_path: Path) -> None:
    processes = start(tmp_path / "out", (), ("--bits", "4"))
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "error: process 1 has config.bits 4, process 0 has 3: give all processes the same" in complaint
    assert not list(tmp_path.iterdir())


def test_who_the_others_are_must_be_known() -> None:
    command = [sys.executable, "-m", "spqr_jax.cli", "quantize", "source", "out", "--distributed"]
    without = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    result = subprocess.run(command, env=without, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the other processes are not known")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_ctrl_c_of_one_process_ends_all(start: Start, tmp_path: Path, victim: int) -> None:
    processes = start(tmp_path / "out")
    wait_for_state(tmp_path / "out.partial", 1, processes)
    processes[victim].send_signal(signal.SIGINT)
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert processes[victim].returncode == 130
    assert ends[victim].endswith("interrupted, the same command resumes\n")
    assert processes[1 - victim].returncode not in (0, None)


def test_ctrl_c_ends_a_process_that_waits_for_the_others(start: Start, tmp_path: Path) -> None:
    waiting, other = start(tmp_path / "out")
    other.kill()
    time.sleep(10)
    waiting.send_signal(signal.SIGINT)
    assert waiting.communicate(timeout=60)[1].endswith("interrupted, the same command resumes\n")
    assert waiting.returncode == 130
    other.communicate()
