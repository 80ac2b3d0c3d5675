"""The command `spqr sweep`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from spqr_jax.cli import console
from spqr_jax.cli.app import Json, Model, app
from spqr_jax.cli.evaluate import TextFile, Window
from spqr_jax.cli.models import encode_text, open_model
from spqr_jax.cli.quantize import Calibration, Seed, SequenceLength, Sequences, calibration_tokens


@app.command()
def sweep(
    source: Model,
    directory: Annotated[Path, typer.Argument(help="Where the results are kept: a JSON file for each cell.")],
    grid: Annotated[Path | None, typer.Option(help="JSON file: a list of settings; default: 31 of them.")] = None,
    calibration: Calibration = None,
    sequences: Sequences = 32,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    text: TextFile = None,
    window: Window = 1024,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = 20,
    as_json: Json = False,
) -> None:
    """Quantize and measure a model with many settings: a table, a figure, and what each part is worth.

    An entry of a grid is like {"method": "spqr", "bits": [3, 4], "group_size": 16}, where a list stands for each of its
    values. What is finished is not done again.

    Example: spqr sweep HuggingFaceTB/SmolLM2-135M-Instruct results
    """
    import jax

    from spqr_jax.figures.sensitivity_maps import new_figure
    from spqr_jax.figures.sweep_figures import ablation_table, perplexity_figure, table
    from spqr_jax.measure.perplexity import cut_windows
    from spqr_jax.search.sweep import DEFAULT_GRID, cells, sweep

    new_figure((1, 1))  # before long work, where there is nothing to draw with
    chosen = cells(DEFAULT_GRID if grid is None else json.loads(grid.read_text()))
    opened = open_model(source, "float16")
    tokens = calibration_tokens(opened.tokenizer, calibration, sequences, sequence_length, seed)
    parts = cut_windows(encode_text(opened.tokenizer, text, "test"), window=window, max_windows=windows)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",)) if jax.device_count() > 1 else None
    steps = sweep(opened, directory, chosen, tokens, parts, mesh=mesh)
    results = list(console.track(steps, len(chosen) + 1, "cells"))
    (directory / "table.md").write_text(table(results))
    (directory / "ablation.md").write_text(ablation_table(results))
    perplexity_figure(results, directory / "perplexity.svg")
    sizes = {r["name"]: f"{r['bits_per_weight']:.2f} bits: {r['perplexity']:.2f}" for r in results}
    console.emit({**sizes, "results": results}, as_json)
