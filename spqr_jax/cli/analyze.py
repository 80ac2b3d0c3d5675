"""The command `spqr analyze`."""

import fnmatch
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.app import Json, Model, app
from spqr_jax.cli.models import open_model
from spqr_jax.cli.quantize import Calibration, Seed, SequenceLength, Sequences, calibration_tokens

KEPT = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Shares of a matrix: its most sensitive weights, with the error that is left when they are kept."""

MEASURES = {
    "outlier_share": "outliers",
    "row_outliers": "in rows",
    "column_outliers": "in columns",
    "unstructured": "elsewhere",
    "head_stripes": "heads",
    "head_contrast": "contrast",
    "rotary_period": "rotary",
}
"""Numbers of a matrix that are drawn and printed, with short names."""


@app.command()
def analyze(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Matrices to draw, as layers_0.q_proj,layers_5.*; default: those of the middle block."),
    ] = None,
    bits: Annotated[int, typer.Option(help="Width of a weight code: 2, 3, 4, 5 or 8.")] = 3,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 8, 16, 32, 64 or 128.")] = 16,
    outlier_threshold: Annotated[float, typer.Option(help="The paper's τ.")] = 0.2,
    calibration: Calibration = None,
    sequences: Sequences = 32,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure how sensitive each weight is to rounding, and where the sensitive ones lie.

    Writes sensitivity.json, a picture of each matrix in --layers, patterns.png and errors.png.

    Example: spqr analyze HuggingFaceTB/SmolLM2-135M-Instruct sensitivity --layers "layers_0.q_proj,layers_5.*"
    """
    import dataclasses

    import numpy as np

    from spqr_jax.analyze.sensitivity import sensitivities
    from spqr_jax.config import SpqrConfig
    from spqr_jax.figures import sensitivity_maps
    from spqr_jax.models.decoder import layer_name
    from spqr_jax.storage.checkpoint import check_destination
    from spqr_jax.storage.description import describe_model
    from spqr_jax.storage.directories import new_directory

    config = SpqrConfig(bits=bits, group_size=group_size, outlier_threshold=outlier_threshold)
    destination = destination.resolve()
    check_destination(destination)
    sensitivity_maps.new_figure((1, 1))  # before long work, where there is nothing to draw with
    opened = open_model(source, "float16")
    blocks = opened.model.config.num_layers
    kinds = opened.model.new_block().matrices()
    names = [f"{layer_name(depth)}.{kind}" for depth in range(blocks) for kind in kinds]
    drawn = chosen(layers or f"{layer_name(blocks // 2)}.*", names)
    tokens = calibration_tokens(opened.tokenizer, calibration, sequences, sequence_length, seed)
    matrices = {}
    with new_directory(destination) as directory:
        for matrix in console.track(sensitivities(opened, tokens, config), len(names), "sensitivity"):
            values = np.asarray(matrix.sensitivity.values)
            if matrix.name in drawn:
                sensitivity_maps.draw_map(values, matrix.name).savefig(directory / f"{matrix.name}.png")
            matrices[matrix.name] = describe(matrix, values)
        content = {
            "model": describe_model(opened.model),
            "config": dataclasses.asdict(config),
            "calibration": {"sequences": sequences, "tokens": sequence_length, "seed": seed},
            "kept": KEPT,
            "matrices": matrices,
        }
        (directory / "sensitivity.json").write_text(json.dumps(content, indent=1))
        sensitivity_maps.draw_by_depth(by_depth(matrices.values())).savefig(directory / "patterns.png")
        left = {kind: mean(m["error_left"] for m in of_kind(matrices.values(), kind)) for kind in kinds}
        sensitivity_maps.draw_errors(KEPT, left).savefig(directory / "errors.png")
    if as_json:
        console.emit({"destination": str(destination)} | content, as_json)
        return
    terminal = Console()
    # Where nobody looks, a file or a pipe, nothing is cut.
    Console(width=None if terminal.is_terminal else 120).print(summary(matrices.values(), kinds))


def chosen(patterns: str, names: Sequence[str]) -> set[str]:
    """The names that match one of several patterns, of which a comma stands between two.

    Raises:
      SpqrError: one of them matches no name.
    """
    found: set[str] = set()
    for pattern in patterns.split(","):
        matching = fnmatch.filter(names, pattern.strip())
        if not matching:
            raise SpqrError(f"no matrix is called {pattern.strip()}: they are {names[0]} to {names[-1]}")
        found.update(matching)
    return found


def describe(matrix: Any, values: Any) -> dict[str, Any]:
    """What the report says of a matrix with these sensitivities."""
    from spqr_jax.analyze.patterns import error_left, find_patterns

    return {
        "kind": matrix.kind,
        "depth": matrix.depth,
        "shape": values.shape,
        "mean": float(values.mean(dtype="float64")),
        "outlier_share": float(matrix.sensitivity.outlier_share),
        **find_patterns(values, matrix.heads)._asdict(),
        "error_left": error_left(values, KEPT).tolist(),
    }


def of_kind(matrices: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The matrices of one kind."""
    return [matrix for matrix in matrices if matrix["kind"] == kind]


def by_depth(matrices: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """For each measure and kind of matrix its value at each depth, where there is one."""
    found: dict[str, dict[str, dict[int, float]]] = {measure: {} for measure in MEASURES}
    for matrix in matrices:
        for measure in MEASURES:
            if matrix[measure] is not None:
                found[measure].setdefault(matrix["kind"], {})[matrix["depth"]] = matrix[measure]
    return {measure.replace("_", " "): kinds for measure, kinds in found.items() if kinds}


def mean(values: Iterable[Any]) -> Any:
    """The mean of numbers, or of lists of numbers place by place."""
    import numpy as np

    return np.mean(list(values), axis=0).tolist()


def summary(matrices: Iterable[dict[str, Any]], kinds: Sequence[str]) -> Table:
    """Means over all blocks, a line for each kind of matrix; last, the error left when 1 % of the weights are kept."""
    table = Table(Column("matrix", no_wrap=True), *MEASURES.values(), "left at 1%", box=None)
    for kind in kinds:
        own = of_kind(matrices, kind)
        cells = ["" if own[0][m] is None else f"{mean(matrix[m] for matrix in own):.3f}" for m in MEASURES]
        left = mean(matrix["error_left"][KEPT.index(0.01)] for matrix in own)
        table.add_row(kind, *cells, f"{left:.3f}")
    return table
