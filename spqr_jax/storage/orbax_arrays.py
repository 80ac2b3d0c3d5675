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
    """Writes non-empty arrays into a new directory, and returns when all are written.

    Raises:
      Exception: writing failed, as on a full disk: an OSError, or from TensorStore a ValueError.
    """
    _quietly(_checkpointer().save, directory, dict(arrays))


def read_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of `write_arrays` into host memory.

    Example:
      >>> write_arrays(Path("arrays").resolve(), {"a": np.arange(3)})
      >>> read_arrays(Path("arrays").resolve())
      {'a': array([0, 1, 2])}
    """
    return _quietly(_checkpointer().restore, directory)


def _checkpointer() -> ocp.Checkpointer:
    """A checkpointer that does not wait for other processes of a run, because only one of them writes."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of Orbax so that only its result or its error is visible.

    The function gets its own thread: it unsets its thread's event loop, which a notebook needs. After a failed write,
    TensorStore continues with the other arrays and reports each as abandoned. Waiting until these reports end ensures
    that no file appears after the directory is deleted. A lock allows one call at a time, because hooks are global.
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
