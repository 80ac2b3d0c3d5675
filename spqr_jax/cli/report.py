"""The command `spqr report`."""

from pathlib import Path
from typing import Annotated

import typer

from spqr_jax.cli import console
from spqr_jax.cli.options import Json
from spqr_jax.storage.paths import absolute


def report(
    directory: Annotated[Path, typer.Argument(parser=absolute, help="A checkpoint of spqr.")],
    output: Annotated[
        Path | None, typer.Option(parser=absolute, help="File to write; default: DIRECTORY.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page on a quantization: totals, plots, settings, versions, and the error of every matrix.

    Example: spqr report smollm2-spqr
    """
    from spqr_jax.figures.report import write_report

    page = write_report(directory, output)
    console.emit({"page": str(page), "bytes": page.stat().st_size}, as_json)
