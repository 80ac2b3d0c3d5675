"""Named arrays on the disk, in Orbax's format."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_LOCK = threading.Lock()


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, none of which may be empty, into a new directory; returns when all is written.

    Raises:
      Exception: writing failed, as on a full disk: an OSError, or from TensorStore a ValueError.
    """
    _quietly(_checkpointer().save, directory, dict(arrays))


def read_arrays(directory: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote, in host memory."""
    return _quietly(_checkpointer().restore, directory)


def _checkpointer() -> ocp.Checkpointer:
    """Works alone: the other processes of a run, if there are any, do not call it at the same time."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of Orbax, of which nothing but its result or its error is to be seen.

    It gets its own thread, because it unsets the event loop of the thread that it runs in, which a notebook needs.
    After a failed write, TensorStore goes on with the other arrays and reports for each that nobody waits for it: this
    does wait, until the reports have ended, so that no file appears after the directory is deleted. One call at a time,
    because the hooks are the process's.
    """
    with _LOCK:
        return _without_reports(function, *args)


def _without_reports(function: Callable[..., Any], *args: Any) -> Any:
    reports: list[Any] = []
    report = sys.unraisablehook
    logger = logging.getLogger("absl")

    def collect(unraisable: Any) -> None:
        (reports.append if str(unraisable.exc_value) == "Event loop is closed" else report)(unraisable)

    def keep(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in record.getMessage()

    sys.unraisablehook = collect
    logger.addFilter(keep)
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()
    except Exception:
        count = -1
        while count < len(reports):
            count = len(reports)
            time.sleep(0.5)
        raise
    finally:
        sys.unraisablehook = report
        logger.removeFilter(keep)
