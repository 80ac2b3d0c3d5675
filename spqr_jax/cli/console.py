"""What commands share: progress bars and tables on standard error, results on standard output, one-line errors."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pallas_kernels.errors import SpqrError
from spqr_jax.storage.record import BlockReport

T = TypeVar("T")

console = Console(stderr=True)


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """The items, with a progress bar on standard error while they come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield from progress.track(items, total=total, description=label)


@contextmanager
def track_blocks(total: int) -> Iterator[Callable[[BlockReport], None]]:
    """What shows finished blocks on standard error: by a bar on a terminal, elsewhere by lines for a log."""
    if not console.is_terminal:
        yield partial(_log_block, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("quantizing blocks", total=total, pace="")
        yield lambda block: progress.update(task, completed=block.number, pace=_pace(block, total))


def _log_block(total: int, block: BlockReport) -> None:
    lines = [f"block {block.number} of {total}: {_pace(block, total)}"]
    lines += [
        f"{name}: error {matrix.relative_error:.2e}, outliers {matrix.outlier_share:.2%}"
        for name, matrix in block.matrices.items()
    ]
    print("\n  ".join(lines), file=sys.stderr, flush=True)


def _pace(block: BlockReport, total: int) -> str:
    """Seconds per block, and the time left; all blocks take as long as this one, but for the first, which compiles."""
    left = timedelta(seconds=round((total - block.number) * block.seconds))
    return f"{block.seconds:.1f} s per block, {left} left"


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Prints a command's result: JSON for machines, or its plain values as a table."""
    if as_json:
        print(json.dumps(result))
        return
    table = Table(show_header=False)
    for key, value in result.items():
        if not isinstance(value, dict | list):
            table.add_row(key.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def quiet() -> None:
    """Keeps advice that no user of the command line can act on off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("absl").setLevel(logging.ERROR)


def reserve_output() -> None:
    """Leaves standard output to Python: what C++ prints there, as libraries of communication do, goes to the errors."""
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(results, "w", encoding=sys.stdout.encoding)


def run(command: Callable[[], Any]) -> None:
    """Runs a command; what a user can cause ends in one line on standard error and exit status 1."""
    try:
        command()
    except (SpqrError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        _leave(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _leave(130)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)


def _leave(status: int) -> NoReturn:
    if jax.distributed.is_initialized():
        # In the ordinary way this process would wait for the others, which wait for it.
        os._exit(status)
    raise SystemExit(status) from None
