"""The command `python -m spqr_jax.benchmark`: benchmarks quantizing or, with `--decode`, decoding.

Exit status: 0 on success, 1 on an error (printed as one line), 2 on wrong usage.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import Format
from pallas_kernels.aot.options import one_of
from pallas_kernels.backends.table import choose
from pallas_kernels.benchmark.rows import now, versions, write
from spqr_jax.benchmark.decode import NEW_TOKENS, measured_rows
from spqr_jax.benchmark.predicted import ASSUMPTIONS, predicted_rows
from spqr_jax.benchmark.random_model import MODELS
from spqr_jax.benchmark.results import Results, Row
from spqr_jax.cli import console

FORM = Format.parse("3b-g16-s3-o1%")
TARGET = "h100"
FOR_ANY_DEVICE = "tiny"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Benchmark decoding instead of quantizing.")] = False,
    model: Annotated[
        str,
        typer.Option(
            parser=one_of(MODELS),
            metavar="|".join(MODELS),
            help=f"Model to decode. Without a GPU, models except {FOR_ANY_DEVICE} are predicted for {TARGET}.",
        ),
    ] = "llama-7b",
    cpu: Annotated[
        str | None,
        typer.Option(help="Benchmark a packed checkpoint on this CPU, beside PyTorch: decoding and evaluation."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows of --decode, updated by row.")] = None,
    seconds: Annotated[
        float, typer.Option(help="With --decode, start no new measurement after this many seconds.")
    ] = float("inf"),
) -> None:
    """Benchmark quantizing or, with random weights in 3 bits and in bfloat16, decoding.

    Example: python -m spqr_jax.benchmark --decode --output decode-h100.json
    """
    if cpu is not None:
        from spqr_jax.benchmark.cpu import measure

        console.emit(measure(cpu), as_json)
        return
    if not decode:
        # Only this benchmark needs the converters.
        from spqr_jax.benchmark import quantization

        quantization.measure_and_print(as_json)
        return
    deadline = time.monotonic() + seconds
    results, rows = plan(model, deadline)
    terminal = Console(stderr=as_json)
    # Not a terminal (a file or a pipe): print full-width rows.
    screen = Console(stderr=as_json, width=None if terminal.is_terminal else 140)
    screen.print(f"{model}, {'measured on' if results.measured else 'PREDICTED for'} {results.device}")
    for assumption in results.assumptions:
        screen.print(f"  {assumption}", soft_wrap=True)
    try:
        for row in rows:
            results = dataclasses.replace(results, rows=(*results.rows, row))
            if row.skipped:
                screen.print(f"{row.weights}, batch {row.batch}, prefix {row.prefix}: skipped, {row.skipped}")
            if output is not None:
                write(results, output)
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if results.measured and time.monotonic() > deadline:
        screen.print("time limit reached: settings without a row are left out")
    if as_json:
        console.emit(dataclasses.asdict(results), as_json=True)
    else:
        screen.print(table(results))


def plan(model: str, deadline: float) -> tuple[Results, Iterator[Row]]:
    """The results still without rows, and an iterator over the rows.

    Rows are measured on a GPU, and for the tiny model on any device. Otherwise they are predicted.
    """
    measured = model == FOR_ANY_DEVICE or choose(None).kernels
    results = Results(
        measured=measured,
        device=jax.devices()[0].device_kind if measured else TARGET,
        model=model,
        new_tokens=NEW_TOKENS,
        assumptions=() if measured else ASSUMPTIONS,
        date=now(),
        versions=versions(),
    )
    if measured:
        return results, measured_rows(MODELS[model], (FORM, None), deadline=deadline)
    return results, predicted_rows(model, FORM, TARGET)


def table(results: Results) -> Table:
    """The table of the rows that have times, in milliseconds."""
    heads = ("weights", "GB", "batch", "prefix", "tokens/s", "in all", "first token", "step", "quartiles")
    parts = ("products", "attention", "rest")
    title = f"{results.model}, {'measured' if results.measured else 'predicted'}, {results.device}; times in ms"
    printed = Table(*heads, *parts, title=title, title_justify="left", box=None)

    def milliseconds(*values: float | None) -> str:
        return "–".join(f"{1e3 * value:.3g}" for value in values if value is not None)

    for row in results.rows:
        if row.skipped is None:
            printed.add_row(
                row.weights,
                f"{row.weight_bytes / 1e9:.3g}",
                str(row.batch),
                str(row.prefix),
                f"{row.tokens_per_second:.0f}",
                f"{row.tokens_per_second_in_all:.0f}",
                milliseconds(row.first_token_seconds),
                milliseconds(row.step_seconds),
                milliseconds(*row.step_quartiles or ()),
                *map(milliseconds, (row.products_seconds, row.attention_seconds, row.rest_seconds)),
            )
    return printed


if __name__ == "__main__":
    console.quiet()
    console.run(app)
