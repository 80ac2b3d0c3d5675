"""Processes to be killed. Each starts in a moment, as a copy of one that has imported the packages and run nothing."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters import open_pretrained
from spqr_jax import SpqrConfig
from spqr_jax.storage.disk_to_disk import quantize_checkpoint

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class QuantizingProcess:
    """Quantizes a checkpoint for these tokens, with the default settings, in a process of its own.

    Args:
      source, destination: directories of checkpoints.
      tokens: calibration tokens.
      kill_at: the number of the event at which it kills itself, see `_quantize`; 0 for never.
    """

    def __init__(self, source: Path, destination: Path, tokens: np.ndarray, kill_at: int = 0) -> None:
        self._receiver, sender = CONTEXT.Pipe(duplex=False)
        cache = str(jax.config.jax_compilation_cache_dir)
        self._process: ForkServerProcess = CONTEXT.Process(
            target=_quantize, args=(source, destination, tokens, kill_at, cache, sender)
        )
        self._process.start()
        sender.close()

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit status, once it has ended; None if it has not after so many seconds."""
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> int | None:
        """Kills it, and returns its exit status."""
        self._process.kill()
        return self.wait()

    def result(self) -> tuple[int, int]:
        """The number of blocks, and that of events, of a process that has come to its end."""
        found: tuple[int, int] = self._receiver.recv()
        self.wait()
        return found


def _quantize(
    source: Path, destination: Path, tokens: np.ndarray, kill_at: int, cache: str, sender: Connection
) -> None:
    """An event is one of Python's audit events that open, move, make or remove files."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    events = 0

    def count(event: str, args: Any) -> None:
        nonlocal events
        if event.split(".")[0] in ("open", "os", "shutil", "pathlib", "tempfile"):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    opened = open_pretrained(source, dtype=np.float16)
    sys.addaudithook(count)
    reports = quantize_checkpoint(opened, destination, tokens, config=SpqrConfig())
    sender.send((len(reports), events))
