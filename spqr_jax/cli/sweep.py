"""The command `spqr sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from spqr_jax.cli import console
from spqr_jax.cli.options import (
    Calibration,
    Json,
    Model,
    Seed,
    SequenceLength,
    Sequences,
    StoredType,
    Texts,
    Window,
    at_least,
)
from spqr_jax.cli.rules import Rule, RulesFile, Skip, read_rules
from spqr_jax.storage.destination import check_outside
from spqr_jax.storage.paths import absolute, resolved


def sweep(
    source: Model,
    directory: Annotated[
        Path, typer.Argument(parser=resolved, help="Directory of the results: a JSON file per cell of the grid.")
    ],
    grid: Annotated[
        Path | None, typer.Option(parser=absolute, help="JSON file: a list of settings; default: 31 of them.")
    ] = None,
    skip: Skip = None,
    rule: Rule = None,
    rules: RulesFile = None,
    calibration: Calibration = None,
    sequences: Sequences = 32,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    text: Texts = None,
    window: Window = 1024,
    windows: Annotated[
        int | None, typer.Option(callback=at_least(1), help="Number of windows to use, from the start.")
    ] = 20,
    dtype: StoredType = None,
    as_json: Json = False,
) -> None:
    """Quantize and measure a model with many settings: a table, a figure, and an ablation.

    An entry of a grid is like {"method": "spqr", "bits": [3, 4], "group_size": 16}, where a list stands for each of its
    values. Finished cells are kept: after an interruption, the same command resumes.

    Example: spqr sweep HuggingFaceTB/SmolLM2-135M-Instruct results
    """
    from spqr_jax.cli.calibration import calibration_tokens
    from spqr_jax.cli.models import mesh_of_all_devices, open_model, read_grid
    from spqr_jax.cli.texts import evaluation_tokens
    from spqr_jax.figures.sensitivity_maps import new_figure
    from spqr_jax.figures.sweep_figures import ablation_table, perplexity_figure, table
    from spqr_jax.measure.perplexity import cut_windows
    from spqr_jax.search.sweep import DEFAULT_GRID, cells, sweep

    found = read_rules(skip, rule, rules)
    check_outside(directory, source)
    new_figure((1, 1))  # reports a missing matplotlib before long work
    chosen = cells(DEFAULT_GRID if grid is None else read_grid(grid))
    opened = open_model(source, dtype)
    first = opened.model.first_token
    tokens = calibration_tokens(opened.tokenizer, calibration, sequences, sequence_length, seed, first)
    ids = evaluation_tokens(opened.tokenizer, text, None, window)
    parts = cut_windows(ids, window=window, max_windows=windows, first=first)
    steps = sweep(opened, directory, chosen, tokens, parts, rules=found, mesh=mesh_of_all_devices())
    results = list(console.track(steps, len(chosen) + 1, "cells"))
    (directory / "table.md").write_text(table(results), encoding="utf-8")
    (directory / "ablation.md").write_text(ablation_table(results), encoding="utf-8")
    perplexity_figure(results, directory / "perplexity.svg")
    sizes = {r["name"]: f"{r['bits_per_weight']:.2f} bits: {r['perplexity']:.2f}" for r in results}
    console.emit({**sizes, "results": results}, as_json)
