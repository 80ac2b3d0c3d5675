"""The command `spqr quantize`."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.app import Json, Model, app
from spqr_jax.cli.models import encode_text, open_model
from spqr_jax.config import Method


class Preset(StrEnum):
    """Settings with names."""

    SMALL = "small"
    COMPACT = "compact"
    NEAR_LOSSLESS = "near-lossless"
    PAPER = "paper"


class Order(StrEnum):
    """Orders of input features."""

    ACT_ORDER = "act_order"
    IDENTITY = "identity"


Calibration = Annotated[
    Path | None, typer.Option(help="Text file, or token ids in a .npy file; default: WikiText-2's validation text.")
]
Sequences = Annotated[int, typer.Option(help="Calibration sequences.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
Seed = Annotated[int, typer.Option(help="Seed of the places where sequences are cut.")]


@app.command()
def quantize(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="small: about 3.55 bits per weight; compact (default): 4.2; near-lossless: 4.7; paper: 3-bit codes in "
            "groups of 16, as in the official format."
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="gptq: no outliers; rtn: round-to-nearest.")] = Method.SPQR,
    bits: Annotated[int | None, typer.Option(help="Width of a weight code: 2, 3, 4, 5 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale: 8, 16, 32, 64 or 128.")] = None,
    stats_bits: Annotated[int | None, typer.Option(help="Width of scale and zero codes; 0 for 16-bit floats.")] = None,
    outlier_threshold: Annotated[float | None, typer.Option(help="The paper's τ; lower keeps more outliers.")] = None,
    permutation: Annotated[Order | None, typer.Option(help="Order in which input features are quantized.")] = None,
    damping: Annotated[float | None, typer.Option(help="Share of mean diag H added to it.")] = None,
    shrinkage: Annotated[
        float | None, typer.Option(help="How much correlations are shrunk, as a multiple of what is chance.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits per weight to be met, to 0.02, by the right settings.")
    ] = None,
    near_lossless: Annotated[
        bool, typer.Option("--near-lossless", help="The smallest settings that cost less than 1 % of perplexity.")
    ] = False,
    calibration: Calibration = None,
    sequences: Sequences = 32,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
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

    Example: spqr quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-spqr
    """
    from dataclasses import replace
    from functools import partial

    if distributed:
        from spqr_jax.runtime.processes import join

        console.reserve_output()
        join()

    import jax

    from spqr_jax.config import COMPACT, NEAR_LOSSLESS, SMALL, SpqrConfig
    from spqr_jax.runtime.processes import is_first
    from spqr_jax.search.target_bits import quantize_to_bits, settings_for
    from spqr_jax.storage.checkpoint import describe
    from spqr_jax.storage.directories import bytes_on_disk
    from spqr_jax.storage.disk_to_disk import quantize_checkpoint
    from spqr_jax.storage.totals import summarize_described

    chosen = {
        "bits": bits,
        "group_size": group_size,
        "outlier_threshold": outlier_threshold,
        "permutation": None if permutation is None else permutation.value,
        "damping": damping,
        "shrinkage": shrinkage,
    }
    if target_bits is not None and (method is not Method.SPQR or outlier_threshold is not None or distributed):
        raise SpqrError(
            "--target-bits finds the threshold of SpQR in one process: leave out --method, --outlier-threshold and "
            "--distributed"
        )
    others = [*chosen.values(), preset, stats_bits, target_bits]
    if near_lossless and (distributed or method is not Method.SPQR or any(value is not None for value in others)):
        raise SpqrError("--near-lossless chooses all settings, in one process: leave the others out")

    presets = {
        Preset.SMALL: SMALL,
        Preset.COMPACT: COMPACT,
        Preset.NEAR_LOSSLESS: NEAR_LOSSLESS,
        Preset.PAPER: SpqrConfig(),
    }
    opened = open_model(source, "float16")
    if target_bits is not None and preset is bits is group_size is None:
        config = settings_for(opened, target_bits)
    else:
        config = presets[preset or Preset.COMPACT]
    config = replace(config, **{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    if stats_bits is not None:
        config = replace(config, scale_bits=stats_bits or None, zero_bits=stats_bits or None)
    config = method.config(config)
    tokens = None
    if method is not Method.RTN and not near_lossless:
        tokens = calibration_tokens(opened.tokenizer, calibration, sequences, sequence_length, seed)

    started = time.perf_counter()
    mesh = jax.make_mesh((jax.device_count(),), ("devices",)) if jax.device_count() > 1 else None
    if near_lossless:
        config, tokens = search(opened, destination, calibration, sequences, sequence_length, seed, mesh)
    run: Any = quantize_checkpoint if target_bits is None else partial(quantize_to_bits, target_bits=target_bits)
    with console.track_blocks(opened.model.config.num_layers) as show:
        blocks = run(
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
    totals = summarize_described(describe(destination))
    console.emit(
        {
            "destination": str(destination),
            "bits_per_weight": totals.bits_per_weight,
            "outlier_share": totals.outlier_share,
            "seconds": time.perf_counter() - started,
            "bytes_on_disk": bytes_on_disk(destination),
            "seconds_per_block": [block.seconds for block in blocks],
            "matrices": {name: matrix._asdict() for block in blocks for name, matrix in block.matrices.items()},
        },
        as_json,
    )


HELD_OUT = 10
"""Windows of 1024 tokens at the end of the calibration text on which `--near-lossless` measures perplexity."""


def search(
    source: Any, destination: Path, text: Path | None, sequences: int, length: int, seed: int, mesh: Any
) -> tuple[Any, Any]:
    """The smallest near-lossless settings and the calibration tokens; results stay in DESTINATION.search.

    Raises:
      SpqrError: none of the settings is near-lossless; or the text is no text, or too short to hold a part of it out.
    """
    import numpy as np

    from spqr_jax.measure.perplexity import cut_windows
    from spqr_jax.search.near_lossless import LARGEST_RISE, smallest_near_lossless
    from spqr_jax.texts import random_windows

    if text is not None and text.suffix == ".npy":
        raise SpqrError(
            f"--near-lossless holds a part of the calibration text out, but {text} has token ids: give text"
        )
    ids = np.array(encode_text(source.tokenizer, text, "valid"))
    window = min(1024, source.model.config.max_positions)
    held_out = min(HELD_OUT, len(ids) // (4 * window))
    if not held_out:
        raise SpqrError(f"the calibration text has {len(ids)} tokens, but --near-lossless needs {4 * window}")
    split = len(ids) - held_out * window
    tokens = random_windows(ids[:split], sequences, length, seed)
    directory = destination.with_name(f"{destination.name}.search")
    found = smallest_near_lossless(source, directory, tokens, cut_windows(ids[split:], window=window), mesh=mesh)
    for result in found.tried:
        rise = result["perplexity"] / found.original_perplexity - 1
        print(f"{result['bits_per_weight']:.2f} bits per weight: perplexity {rise:+.2%}", file=sys.stderr)
    if found.config is None:
        largest = max(found.tried, key=lambda result: result["bits_per_weight"])
        raise SpqrError(
            f"no settings under 5 bits are near-lossless here: with {largest['bits_per_weight']:.2f} bits per weight, "
            f"perplexity on held-out text rises by {largest['perplexity'] / found.original_perplexity - 1:.1%}, not by "
            f"less than {LARGEST_RISE:.0%}; take --bits 5, or the results in {directory} as they are"
        )
    return found.config, tokens


def calibration_tokens(tokenizer: Any, text: Path | None, sequences: int, length: int, seed: int) -> Any:
    """Calibration windows at random places of a text file, or of the package's; or those of a file of token ids."""
    import numpy as np

    from spqr_jax.texts import random_windows

    if text is not None and text.suffix == ".npy":
        return np.load(text).astype(np.int32)
    return random_windows(np.array(encode_text(tokenizer, text, "valid")), sequences, length, seed)
