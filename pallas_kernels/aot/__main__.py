"""The command `python -m pallas_kernels.aot`: predicts the cost of every kernel on a GPU, without the GPU.

Exit status: 0 on success, 1 on an error (printed as one line), 2 on wrong usage.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot.costs import KernelReport, report_all
from pallas_kernels.aot.gpus import GPUS
from pallas_kernels.aot.options import parse_format, parse_shape
from pallas_kernels.errors import SpqrError

FORMATS = ["3b-g16-s3", "4b-g16-s3"]
TOKENS = [1, 16, 512]
SHAPES = ["4096x4096", "4096x11008"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Target(StrEnum):
    """The choices of `--target`."""

    H100 = "h100"
    A100 = "a100"
    RTX4090 = "rtx4090"
    ALL = "all"


@app.command()
def main(
    target: Annotated[list[Target], typer.Option(help="GPU to compile for; like the next three, can be repeated.")],
    form: Annotated[
        list[Any],
        typer.Option(
            "--format",
            parser=parse_format,
            metavar="FORMAT",
            help="Bits, group size, optional statistics bits (default 16) and outlier share: 3b-g16-s3-o2%.",
        ),
    ] = FORMATS,
    tokens: Annotated[list[int], typer.Option(min=1, help="Number of tokens (rows of x).")] = TOKENS,
    shape: Annotated[
        list[Any], typer.Option(parser=parse_shape, metavar="OUTxIN", help="Rows and columns of the matrix.")
    ] = SHAPES,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as a JSON list.")] = False,
) -> None:
    """Compile every kernel for the target GPUs and print its predicted cost. No GPU is needed.

    Example: python -m pallas_kernels.aot --target h100 --format 3b-g16-s3-o2% --tokens 1 --tokens 16
    """
    targets = list(GPUS) if Target.ALL in target else [one.value for one in target]
    try:
        reports = report_all(list(itertools.product(targets, form, tokens, shape)))
    except (SpqrError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps([dataclasses.asdict(kernel) for kernels in reports for kernel in kernels]))
        return
    terminal = Console()
    # Not a terminal (a file or a pipe): print full-width rows.
    output = Console(width=None if terminal.is_terminal else 120)
    for kernels in reports:
        if kernels:
            output.print(_table(kernels))


def _table(kernels: Sequence[KernelReport]) -> Table:
    """The kernels of one compiled program, one per column."""
    first = kernels[0]
    out, columns = first.shape
    title = f"{first.target}, {first.format}, {out}x{columns}, tokens: {first.tokens}"
    table = Table("", *(kernel.kernel for kernel in kernels), title=title, title_justify="left", box=None)

    def row(label: str, values: Sequence[object], form: str = "") -> None:
        table.add_row(label, *("" if value is None else format(value, form) for value in values))

    row("registers", [kernel.registers for kernel in kernels])
    row("bytes spilled", [kernel.spill_bytes for kernel in kernels])
    row("bytes of shared memory", [kernel.shared_bytes for kernel in kernels])
    row("global loads: bytes x number", [_widths(kernel.load_bytes) for kernel in kernels])
    row("  loads of codes", [_widths(kernel.code_load_bytes) for kernel in kernels])
    row("loads of each code", [kernel.code_reads for kernel in kernels], ".2f")
    row("instructions per weight", [kernel.instructions_per_weight for kernel in kernels], ".2f")
    for kind in dict.fromkeys(kind for kernel in kernels for kind in kernel.kinds or ()):
        row(f"  {kind}", [kernel.kinds and kernel.kinds.get(kind, 0.0) for kernel in kernels], ".2f")
    row("bytes read per weight", [kernel.bytes_per_weight for kernel in kernels], ".3f")
    row("issue time, µs", [kernel.issue_us for kernel in kernels], ".2f")
    row("  loop over outliers", [kernel.outlier_us for kernel in kernels], ".2f")
    row("memory time, µs", [kernel.memory_us for kernel in kernels], ".2f")
    row("predicted time, µs", [kernel.predicted_us for kernel in kernels], ".2f")
    return table


def _widths(loads: dict[int, int]) -> str:
    return " ".join(f"{width}x{count}" for width, count in loads.items())


if __name__ == "__main__":
    app()
