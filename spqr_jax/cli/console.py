"""Input and output of the commands: progress on standard error, results on standard output, errors in one line."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import interrupts
from spqr_jax.storage.json_files import finite

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

UNLIMITED = 100_000
"""Columns of a table in a file or a pipe, where rows are not cut."""

console = Console(stderr=True)

Stream = Any
"""A text stream: a file, or an object of Python in its place, such as a notebook's."""

_RESULTS: ContextVar[Stream | None] = ContextVar("results", default=None)


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields the items, with a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield from progress.track(items, total=total, description=label)


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints a command's result: JSON for machines, or its plain values as a table."""
    if as_json:
        print(json.dumps(finite(result), allow_nan=False), file=results())
        return
    table = Table("", Column(overflow="fold"), show_header=False)
    for key, value in result.items():
        if not isinstance(value, dict | list):
            table.add_row(key.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    output().print(table)


def output() -> Console:
    """Results as tables: rows as wide as the terminal, or uncut in a file or a pipe; names are no markup."""
    width = None if Console(file=results()).is_terminal else UNLIMITED
    return Console(file=results(), width=width, markup=False, emoji=False, highlight=False)


def results() -> Stream:
    """Standard output, for results alone; see `only_results`."""
    return _RESULTS.get() or sys.stdout


@contextmanager
def only_results() -> Iterator[None]:
    """Keeps standard output for `results`: what libraries print meanwhile, in Python or C++, goes to standard error."""
    with _own_output() as stream, redirect_stdout(sys.stderr):
        token = _RESULTS.set(stream)
        try:
            yield
        finally:
            _RESULTS.reset(token)


@contextmanager
def _own_output() -> Iterator[Stream]:
    """A stream to the standard output of this process, whose descriptor leads to standard error meanwhile."""
    try:
        descriptors = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError):  # closed, or replaced by an object of Python
        yield sys.stdout
        return
    sys.stdout.flush()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    with os.fdopen(os.dup(descriptors[0]), "w", encoding=encoding, errors=errors) as stream:
        os.dup2(descriptors[1], descriptors[0])
        try:
            yield stream
        finally:
            os.dup2(stream.fileno(), descriptors[0])


def quiet() -> None:
    """Silences messages that no user of the command line can act on, and lets no character stop an output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # a terminal in cp1252 or ASCII cannot show every character


def run(command: Callable[[], object]) -> None:
    """Runs a command; an error ends in one line on standard error and exit status 1.

    A user can cause `SpqrError`, `OSError`, a missing package, a lack of memory, and a lost process of a distributed
    run. Every other exception is a bug of this project, and the line says so. With SPQR_TRACEBACK=1 the traceback comes
    first.
    """
    try:
        command()
    except KeyboardInterrupt:
        interrupted(resumes=False)
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        _leave(1)


def interrupted(*, resumes: bool) -> NoReturn:
    """Ends an interrupted command with exit status 130, and says whether the same command resumes its work."""
    interrupts.tell(resumes=resumes)
    _leave(interrupts.STATUS)


def describe(error: Exception) -> str:
    """One line on an error.

    Example:
      >>> describe(ZeroDivisionError("division by zero"))
      'internal error: ZeroDivisionError: division by zero; set SPQR_TRACEBACK=1 for the traceback, and report it'
    """
    message = " ".join(line.strip() for line in str(error).splitlines())
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
            return _missing_platform(message)
        case AssertionError() if not message and _cannot_start():
            return _missing_platform("its plugin is not installed")
        case RuntimeError() if _is_distributed():
            return f"another process failed or cannot be reached, so this one ends: {message}"
    kind = type(error).__name__
    return f"internal error: {kind}: {message}; set {TRACEBACK}=1 for the traceback, and report it"


def _missing_platform(reason: str) -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    return f"JAX_PLATFORMS is {platforms}, but JAX cannot start it ({reason})" if platforms else reason


def _cannot_start() -> bool:
    """Whether JAX fails at what all programs begin with: it asserts where the plugin of CUDA is not installed."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError):
        return True
    return False


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
