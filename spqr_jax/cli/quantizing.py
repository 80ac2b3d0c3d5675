"""The command `spqr quantize`."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from spqr_jax import console
from spqr_jax.cli.app import Json, Model, app
from spqr_jax.cli.models import encode_text, open_model


class Method(StrEnum):
    """What to quantize with."""

    SPQR = "spqr"
    GPTQ = "gptq"
    RTN = "rtn"


class Preset(StrEnum):
    """The paper's two settings."""

    COMPACT = "compact"
    NEAR_LOSSLESS = "near-lossless"


class Order(StrEnum):
    """Orders of input features."""

    ACT_ORDER = "act_order"
    IDENTITY = "identity"


@app.command()
def quantize(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    preset: Annotated[Preset, typer.Option(help="compact: 3 bits; near-lossless: 4 bits.")] = Preset.COMPACT,
    method: Annotated[Method, typer.Option(help="gptq: no outliers; rtn: round-to-nearest.")] = Method.SPQR,
    bits: Annotated[int | None, typer.Option(help="Width of a weight code: 2, 3, 4, 5 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale: 8, 16, 32, 64 or 128.")] = None,
    stats_bits: Annotated[int | None, typer.Option(help="Width of scale and zero codes; 0 for 16-bit floats.")] = None,
    outlier_threshold: Annotated[float | None, typer.Option(help="The paper's τ; lower keeps more outliers.")] = None,
    permutation: Annotated[Order | None, typer.Option(help="Order in which input features are quantized.")] = None,
    damping: Annotated[float | None, typer.Option(help="Share of mean diag H added to it.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file; default: WikiText-2's validation text.")] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    sequence_length: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the places where sequences are cut.")] = 0,
    hidden_on_disk: Annotated[
        bool, typer.Option("--hidden-on-disk", help="Keep hidden states in mapped files, not in memory.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint at the destination.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several processes with this command, see README.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and save it; one block is in memory at a time, and all devices share the work.

    What is finished is kept in DESTINATION.partial: stopped by whatever, the same command goes on from there.

    Example: spqr quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-3bit
    """
    from dataclasses import replace

    if distributed:
        from spqr_jax.processes import join

        console.reserve_output()
        join()

    import jax

    from spqr_jax.checkpoint import describe
    from spqr_jax.config import COMPACT, NEAR_LOSSLESS
    from spqr_jax.processes import is_first
    from spqr_jax.streaming import quantize_checkpoint

    config = {Preset.COMPACT: COMPACT, Preset.NEAR_LOSSLESS: NEAR_LOSSLESS}[preset]
    chosen = {
        "bits": bits,
        "group_size": group_size,
        "outlier_threshold": outlier_threshold,
        "permutation": None if permutation is None else permutation.value,
        "damping": damping,
    }
    config = replace(config, **{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    if stats_bits is not None:
        config = replace(config, scale_bits=stats_bits or None, zero_bits=stats_bits or None)
    if method is not Method.SPQR:
        config = replace(config, outlier_threshold=None)

    opened = open_model(source, "float16")
    tokens = None
    if method is not Method.RTN:
        tokens = calibration_tokens(opened.tokenizer, calibration, sequences, sequence_length, seed)

    started = time.perf_counter()
    mesh = jax.make_mesh((jax.device_count(),), ("devices",)) if jax.device_count() > 1 else None
    with console.track_blocks(opened.model.config.num_layers) as show:
        blocks = quantize_checkpoint(
            opened,
            destination,
            tokens,
            config=config,
            mesh=mesh,
            hidden_on_disk=hidden_on_disk,
            overwrite=overwrite,
            on_block=show if is_first() else None,
        )
    if not is_first():
        return
    matrices = describe(destination)["matrices"].values()
    weights = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in matrices)
    console.emit(
        {
            "destination": str(destination),
            "bits_per_weight": 8 * sum(matrix["bytes"] for matrix in matrices) / weights,
            "outlier_share": sum(matrix["outliers"] or 0 for matrix in matrices) / weights,
            "seconds": time.perf_counter() - started,
            "bytes_on_disk": console.bytes_on_disk(destination),
            "seconds_per_block": [block.seconds for block in blocks],
            "matrices": {name: matrix._asdict() for block in blocks for name, matrix in block.matrices.items()},
        },
        as_json,
    )


def calibration_tokens(tokenizer: Any, text: Path | None, sequences: int, length: int, seed: int) -> Any:
    """Calibration windows at random places of a text file, or of the package's."""
    import numpy as np

    from spqr_jax.corpus import random_windows

    return random_windows(np.array(encode_text(tokenizer, text, "valid")), sequences, length, seed)
