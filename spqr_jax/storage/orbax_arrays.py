"""Named arrays on the disk, in Orbax's format."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from spqr_jax.storage.digests import identical
from spqr_jax.storage.errors import CheckpointError

_LOCK = threading.Lock()

_SPECIAL = re.compile(r"[][*?\\]")
_DESCRIPTORS = Path("/proc/self/fd")
# The name under which Orbax keeps the arrays of a directory.
_ARRAYS = "arrays"


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes non-empty arrays into a new directory, reads them back and compares their bits.

    Raises:
      CheckpointError: the arrays on the disk are not those that were written.
      Exception: writing failed, as on a full disk: an OSError, or from TensorStore a ValueError.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _without_special_characters(directory) as path:
        _quietly(_write, path, dict(arrays))
    stored = read_arrays(directory)
    for name, array in arrays.items():
        if name not in stored or not identical(stored[name], array):
            raise CheckpointError(f"{directory} does not have the {name} that was written to it: choose another disk")


def read_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of `write_arrays`, also those of format version 2, into host memory.

    Example:
      >>> write_arrays(Path("arrays").resolve(), {"a": np.arange(3)})
      >>> read_arrays(Path("arrays").resolve())
      {'a': array([0, 1, 2])}
    """
    with _without_special_characters(directory) as path:
        return _quietly(_read, path)


@contextmanager
def _without_special_characters(directory: Path) -> Iterator[Path]:
    """Yields a path of the directory that Orbax takes literally; the directory above must exist.

    Orbax takes its directory as a pattern of `glob`. With `[v2]` in its path it finds none of the arrays that it has
    written. TensorStore takes a backslash as a slash, and writes into another directory.
    """
    if not _SPECIAL.search(str(directory.parent)):
        yield directory
        return
    if not _DESCRIPTORS.is_dir():
        raise CheckpointError(f"{directory} has one of the characters *?[]\\ in its path: choose a path without them")
    parent = os.open(directory.parent, os.O_RDONLY)
    try:
        yield _DESCRIPTORS / str(parent) / directory.name
    finally:
        os.close(parent)


def _write(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    if jax.process_count() > 1:
        _write_alone(directory, arrays)
        return
    with _alone():
        ocp.save(directory, arrays, checkpointable_name=_ARRAYS)


def _write_alone(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the same files by Orbax's former API.

    `save` of API v1 (Orbax 0.12.8) compares the directories of all processes, also of those that are not active, and so
    waits for processes that do not write.
    """
    options = _alone().multiprocessing.v0()
    handler = orbax.CompositeCheckpointHandler(
        composite_options=orbax.CompositeOptions(multiprocessing_options=options),
        **{_ARRAYS: orbax.PyTreeCheckpointHandler(multiprocessing_options=options)},
    )
    args = orbax.args.Composite(**{_ARRAYS: orbax.args.PyTreeSave(arrays)})
    orbax.Checkpointer(handler, multiprocessing_options=options).save(directory, args=args)


def _read(directory: Path) -> dict[str, np.ndarray]:
    # Without a name, Orbax finds the arrays in the directory below or, in format version 2, in this one.
    with _alone():
        return ocp.load(directory)


def _alone() -> ocp.Context:
    """Makes Orbax not wait for other processes of a run, because only one of them writes."""
    own = jax.process_index()
    context = ocp.Context()
    context.multiprocessing.primary_host = own
    context.multiprocessing.active_processes = {own}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{own}"
    return context


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
