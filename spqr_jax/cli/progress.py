"""Progress of a quantization on standard error, block by block."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spqr_jax.cli import console
from spqr_jax.storage.record import BlockReport


@contextmanager
def track_blocks(total: int, ends: int = 0) -> Iterator[Callable[[BlockReport], None]]:
    """A function that shows a finished block on standard error: a bar on a terminal, lines for a log elsewhere.

    Args:
      total: number of blocks.
      ends: number of parts behind them that are quantized, embedding and head.
    """
    if not console.console.is_terminal:
        yield partial(_log_block, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console.console) as progress:
        task = progress.add_task("quantizing blocks", total=total + ends, pace="")
        yield lambda block: progress.update(task, completed=block.number, pace=_pace(block, total))


def _log_block(total: int, block: BlockReport) -> None:
    if block.number <= total:
        lines = [f"block {block.number} of {total}: {_pace(block, total)}"]
    else:
        lines = [f"{', '.join(block.matrices)}: {block.seconds:.1f} s"]
    lines += [
        f"{name}: error {matrix.relative_error:.2e}, outliers {matrix.outlier_share:.2%}"
        + (
            ", solved for the tokens of all experts, its own being too few: give more sequences"
            if matrix.pooled
            else ""
        )
        for name, matrix in block.matrices.items()
    ]
    print("\n  ".join(lines), file=sys.stderr, flush=True)


def _pace(block: BlockReport, total: int) -> str:
    """Seconds per block and the time left, if all blocks take as long as this one; the first also compiles."""
    left = timedelta(seconds=round(max(total - block.number, 0) * block.seconds))
    return f"{block.seconds:.1f} s per block, {left} left"
