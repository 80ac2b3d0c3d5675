"""The command `spqr analyze`."""

from pathlib import Path
from typing import Annotated

import typer

from spqr_jax.cli import console
from spqr_jax.cli.options import Calibration, Json, Model, Seed, SequenceLength, Sequences, StoredType, at_least
from spqr_jax.storage.destination import check_destination, check_outside
from spqr_jax.storage.paths import resolved


def analyze(
    source: Model,
    destination: Annotated[Path, typer.Argument(parser=resolved, help="Directory to write; must not exist.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Matrices to draw, as layers_0.q_proj,layers_5.*; default: those of the middle block."),
    ] = None,
    bits: Annotated[int, typer.Option(callback=at_least(1), help="Width of a weight code: 2, 3, 4, 5 or 8.")] = 3,
    group_size: Annotated[
        int, typer.Option(callback=at_least(1), help="Weights that share a scale: 8, 16, 32, 64 or 128.")
    ] = 16,
    outlier_threshold: Annotated[float, typer.Option(callback=at_least(0), help="The paper's τ.")] = 0.2,
    calibration: Calibration = None,
    sequences: Sequences = 32,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    dtype: StoredType = None,
    as_json: Json = False,
) -> None:
    """Measure how sensitive each weight is to rounding, and where the sensitive ones lie.

    Writes sensitivity.json, a picture of each matrix in --layers, patterns.png and errors.png.

    Example: spqr analyze HuggingFaceTB/SmolLM2-135M-Instruct sensitivity --layers "layers_0.q_proj,layers_5.*"
    """
    from spqr_jax.cli.calibration import calibration_tokens
    from spqr_jax.cli.models import open_model
    from spqr_jax.cli.sensitivity import matching, matrix_names, summary_table, write_study
    from spqr_jax.config import SpqrConfig
    from spqr_jax.figures.sensitivity_maps import new_figure
    from spqr_jax.models.decoder import layer_name

    config = SpqrConfig(bits=bits, group_size=group_size, outlier_threshold=outlier_threshold)
    check_outside(destination, source)
    check_destination(destination)
    new_figure((1, 1))  # reports a missing matplotlib before long work
    opened = open_model(source, dtype)
    middle = opened.model.config.num_layers // 2
    drawn = matching(layers or f"{layer_name(middle)}.*", matrix_names(opened.model))
    tokens = calibration_tokens(
        opened.tokenizer, calibration, sequences, sequence_length, seed, opened.model.first_token
    )
    sizes = {"sequences": sequences, "tokens": sequence_length, "seed": seed}
    content = write_study(destination, opened, tokens, config, sizes, drawn)
    if as_json:
        console.emit({"destination": str(destination)} | content, as_json)
    else:
        console.output().print(summary_table(list(content["matrices"].values())))
