"""Input and output of the commands: progress on standard error, results on standard output, errors in one line."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pallas_kernels.errors import SpqrError

T = TypeVar("T")

TRACEBACK = "SPQR_TRACEBACK"
"""Environment variable: with the value 1, every error prints its traceback."""

EXTRAS = {
    "datasets": "datasets",
    "lm_eval": "lm-eval",
    "matplotlib": "plots",
    "pyarrow": "datasets",
    "torch": "torch",
    "tqdm": "lm-eval",
}
"""Extras of optional packages; all other packages belong to the extra `models`."""

LOG_WIDTH = 120
"""Columns of a table in a file or a pipe, where nothing says how wide a line may be."""

console = Console(stderr=True)


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields the items, with a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield from progress.track(items, total=total, description=label)


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints a command's result: JSON for machines, or its plain values as a table."""
    if as_json:
        print(json.dumps(result))
        return
    table = Table(show_header=False)
    for key, value in result.items():
        if not isinstance(value, dict | list):
            table.add_row(key.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def wide() -> Console:
    """Standard output for a table with many columns: as wide as the terminal, or 120 columns in a file or a pipe."""
    # Not a terminal: rich would assume 80 columns and cut names.
    return Console(width=None if Console().is_terminal else LOG_WIDTH)


def quiet() -> None:
    """Silences messages that no user of the command line can act on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("absl").setLevel(logging.ERROR)


def reserve_output() -> None:
    """Keeps standard output for Python's results: what C++ libraries print there goes to standard error."""
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(results, "w", encoding=sys.stdout.encoding)


def run(command: Callable[[], object]) -> None:
    """Runs a command; an error ends in one line on standard error and exit status 1.

    A user can cause `SpqrError`, `OSError`, a missing package, a lack of memory, and a lost process of a distributed
    run. Every other exception is a bug of this project, and the line says so. With SPQR_TRACEBACK=1 the traceback comes
    first.
    """
    try:
        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _leave(130)
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        _leave(1)


def describe(error: Exception) -> str:
    """One line on an error.

    Example:
      >>> describe(ZeroDivisionError("division by zero"))
      'internal error: ZeroDivisionError: division by zero; set SPQR_TRACEBACK=1 for the traceback, and report it'
    """
    message = " ".join(str(error).split())
    match error:
        case SpqrError() | OSError():
            return message
        case ModuleNotFoundError() if error.name is not None and not _is_own(error.name):
            package = error.name.partition(".")[0]
            return f'{package} is not installed: pip install "spqr-jax[{EXTRAS.get(package, "models")}]"'
        case MemoryError():
            return f"out of memory: {message or 'this process cannot allocate more'}"
        case RuntimeError() if "RESOURCE_EXHAUSTED" in message:
            return f"out of memory on the device: {message}"
        case RuntimeError() if message.startswith("Unable to initialize backend"):
            return message  # JAX_PLATFORMS names a backend that is not here, and the message says so
        case RuntimeError() if _is_distributed():
            return f"another process failed or cannot be reached, so this one ends: {message}"
    kind = type(error).__name__
    return f"internal error: {kind}: {message}; set {TRACEBACK}=1 for the traceback, and report it"


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("spqr_jax", "pallas_kernels", "converters")


def _is_distributed() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave(status: int) -> NoReturn:
    if _is_distributed():
        # An ordinary exit waits for the other processes, which wait for this one.
        os._exit(status)
    raise SystemExit(status) from None
