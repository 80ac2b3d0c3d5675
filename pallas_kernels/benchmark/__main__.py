"""The command `python -m pallas_kernels.benchmark`: times products with packed matrices against the alternatives.

Times are measured on the present GPU, or predicted if there is none. Exit status: 0 on success, 1 on an error (printed
as one line) or a wrong product of this library, 2 on wrong usage.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import GPUS, Format
from pallas_kernels.aot.options import one_of, parse_format, parse_shape
from pallas_kernels.backends.table import choose
from pallas_kernels.benchmark.contestants import BFLOAT16, DENSE_PART, SPQR
from pallas_kernels.benchmark.measured import measured_rows
from pallas_kernels.benchmark.predicted import checked, predicted_rows
from pallas_kernels.benchmark.rows import Results, Row, now, versions, write
from pallas_kernels.benchmark.shapes import MODELS, TOKENS, names, plan
from pallas_kernels.benchmark.timing import bandwidth
from pallas_kernels.benchmark.torch_contestants import missing
from pallas_kernels.errors import SpqrError

FORMAT = "3b-g16-s3-o1%"
TARGET = "h100"

Produce = Callable[..., Iterator[list[Row]]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    model: Annotated[
        list[str],
        # Without an explicit name, some releases of typer name the option --MODEL after its metavar.
        typer.Option("--model", parser=one_of(MODELS), metavar="MODEL", help="Use this model's matrices; repeatable."),
    ] = list(MODELS),  # noqa: B006
    shape: Annotated[
        list[Any] | None,
        typer.Option(parser=parse_shape, metavar="OUTxIN", help="Matrix shape to use instead of models; repeatable."),
    ] = None,
    tokens: Annotated[list[int], typer.Option(min=1, help="Number of tokens (rows of x); repeatable.")] = TOKENS,
    form: Annotated[
        Any,
        typer.Option(
            "--format", parser=parse_format, metavar="FORMAT", help="Packed format, as in pallas_kernels.aot."
        ),
    ] = FORMAT,
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows, updated during the run.")] = None,
    seconds: Annotated[float, typer.Option(help="Start no new measurement after this many seconds.")] = float("inf"),
    target: Annotated[
        str | None,
        typer.Option(
            parser=one_of(GPUS),
            metavar="|".join(GPUS),
            help=f"Predict for this GPU instead of measuring. Default without a GPU: {TARGET}.",
        ),
    ] = None,
) -> None:
    """Time products with packed matrices, with bfloat16 matrices and in other programs, after checking each result.

    Example: python -m pallas_kernels.benchmark --model llama-7b --tokens 1 --tokens 16 --output kernels-h100.json
    """
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {output.parent} for {output.name}; create it first")
    deadline = time.monotonic() + seconds
    shapes = dict.fromkeys(shape, "") if shape else names(model)
    terminal = Console()
    # Not a terminal (a file or a pipe): print full-width rows.
    console = Console(width=None if terminal.is_terminal else 140)
    try:
        if target is None and choose(None).kernels:
            results, produce = measurement(form, console)
        else:
            results, produce = prediction(form, target or TARGET, console)
        for rows in run(plan(shapes, tokens), shapes, produce, deadline, console):
            results = dataclasses.replace(results, rows=(*results.rows, *rows))
            if output is not None:
                write(results, output)
    except (SpqrError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if any(row.error and row.contestant in (SPQR, DENSE_PART) for row in results.rows):
        raise typer.Exit(1)


def measurement(form: Format, console: Console) -> tuple[Results, Produce]:
    """The results of the present device, still without rows, and the function that measures rows."""
    # JAX uses NVIDIA's library for products with sparse matrices only on request.
    jax.config.update("jax_bcoo_cusparse_lowering", True)
    device, reached = jax.devices()[0].device_kind, bandwidth()
    console.print(f"measured on {device}, which copies {reached / 1e12:.2f} TB/s")
    skipped = missing(form)
    for contestant, why in skipped.items():
        console.print(f"{contestant}: rows are skipped because {why}", soft_wrap=True)
    rate = next((gpu.tensor_rate for name, gpu in GPUS.items() if name in device.lower().replace(" ", "")), None)
    results = Results(True, device, reached, rate, checked={}, date=now(), versions=versions())
    return results, functools.partial(measured_rows, form, bandwidth=reached, skipped=skipped)


def prediction(form: Format, target: str, console: Console) -> tuple[Results, Produce]:
    """The results of a device that need not be present, still without rows, and the function that predicts rows."""
    errors = checked(form)
    console.print(f"predicted for {target}, not measured; {BFLOAT16} is a roofline of its bytes and operations")
    for tokens, error in errors.items():
        console.print(f"relative error of the interpreted kernel, {tokens} tokens: {error:.1e}")
    gpu = GPUS[target]
    results = Results(False, target, gpu.bandwidth, gpu.tensor_rate, checked=errors, date=now(), versions=versions())
    return results, functools.partial(predicted_rows, target, form)


def run(
    work: Sequence[tuple[tuple[int, int], Sequence[int]]],
    matrices: dict[tuple[int, int], str],
    produce: Produce,
    deadline: float,
    console: Console,
) -> Iterator[list[Row]]:
    """Yields rows as they are produced until the deadline, and prints each shape's rows as a table."""
    left_out = 0
    for shape, tokens in work:
        rows: list[Row] = []
        if time.monotonic() < deadline:
            for found in produce(shape, tokens, matrix=matrices[shape]):
                rows += found
                yield found
                if time.monotonic() > deadline:
                    break
            console.print(table(rows))
        left_out += len(tokens) - len({row.tokens for row in rows})
    if left_out:
        console.print(
            f"time limit reached: {left_out} of {sum(len(tokens) for _, tokens in work)} settings are left out"
        )


def table(rows: Sequence[Row]) -> Table:
    """The table of the rows of one shape."""
    out, columns = rows[0].shape
    time_head = "µs" if rows[0].source == "measured" else "µs, predicted"
    heads = ("tokens", "contestant", "format", time_head, "quartiles", f"× {BFLOAT16}", "bandwidth", "error")
    result = Table(*heads, title=f"{out}x{columns}  {rows[0].matrix}", title_justify="left", box=None)
    dense = {row.tokens: row.seconds for row in rows if row.contestant == BFLOAT16}
    for row in rows:
        if row.seconds is None:
            result.add_row(str(row.tokens), row.contestant, row.format, "", "", "", "", row.error)
            continue
        beside = dense.get(row.tokens)
        result.add_row(
            str(row.tokens),
            row.contestant,
            row.format,
            f"{1e6 * row.seconds:.2f}",
            "–".join(f"{1e6 * quartile:.2f}" for quartile in row.quartiles or ()),
            f"{beside / row.seconds:.2f}" if beside else "",
            f"{row.bandwidth_fraction:.0%}",
            "" if row.relative_error is None else f"{row.relative_error:.1e}",
        )
    return result


if __name__ == "__main__":
    app()
