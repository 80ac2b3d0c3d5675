"""The work of `spqr quantize`: the search for near-lossless settings, the run with its progress, and its result."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.progress import track_blocks
from spqr_jax.config import SpqrConfig
from spqr_jax.runtime.processes import is_first
from spqr_jax.search import near_lossless
from spqr_jax.search.target_bits import quantize_to_bits
from spqr_jax.storage.checkpoint import describe
from spqr_jax.storage.directories import bytes_on_disk
from spqr_jax.storage.disk_to_disk import quantize_checkpoint
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import BlockReport
from spqr_jax.storage.totals import summarize_described


def search(
    source: ModelSource,
    destination: Path,
    text: Int[np.ndarray, " tokens"],
    sequences: int,
    length: int,
    seed: int,
    mesh: Mesh | None,
) -> tuple[SpqrConfig, Int[np.ndarray, "sequences length"], dict[str, float]]:
    """The smallest near-lossless configuration, the calibration tokens, and what was measured of it.

    Results are kept in DESTINATION.search.

    Raises:
      SpqrError: no configuration is near-lossless, or the text is too short to hold a part of it out.
    """
    positions = source.model.config.max_positions
    held = near_lossless.hold_out(text, sequences=sequences, length=length, seed=seed, max_positions=positions)
    directory = destination.with_name(f"{destination.name}.search")
    found = near_lossless.smallest_near_lossless(source, directory, held.calibration_tokens, held.windows, mesh=mesh)
    for result in found.tried:
        rise = result["perplexity"] / found.original_perplexity - 1
        print(f"{result['bits_per_weight']:.2f} bits per weight: perplexity {rise:+.2%}", file=sys.stderr)
    if found.config is None:
        largest = max(found.tried, key=lambda result: result["bits_per_weight"])
        raise SpqrError(
            f"no settings under 5 bits are near-lossless here: with {largest['bits_per_weight']:.2f} bits per weight, "
            f"perplexity on held-out text rises by {largest['perplexity'] / found.original_perplexity - 1:.1%}, not by "
            f"less than {near_lossless.LARGEST_RISE:.0%}: use --bits 5, or choose from the results in {directory}"
        )
    quality = {
        "perplexity on held-out text": found.perplexity,
        "perplexity of the base model on it": found.original_perplexity,
    }
    return found.config, held.calibration_tokens, quality


def run(
    source: ModelSource,
    destination: Path,
    tokens: Int[np.ndarray, "sequences length"] | None,
    config: SpqrConfig,
    target_bits: float | None,
    **options: Any,
) -> list[BlockReport] | None:
    """Quantizes a model, with progress on standard error.

    Args:
      source: the model.
      destination: directory of the checkpoint.
      tokens: calibration tokens; None for round-to-nearest.
      config: what to quantize to.
      target_bits: bits per weight that an outlier threshold is searched for.
      options: the others of `quantize_checkpoint`.

    Returns:
      A report per block; None in a process that is not the first of a distributed run.
    """
    quantize: Callable[..., list[BlockReport]] = quantize_checkpoint
    if target_bits is not None:
        quantize = partial(quantize_to_bits, target_bits=target_bits)
    with track_blocks(source.model.config.num_layers) as show:
        on_block = show if is_first() else None
        blocks = quantize(source, destination, tokens, config=config, on_block=on_block, **options)
    return blocks if is_first() else None


def describe_run(destination: Path, blocks: Sequence[BlockReport], seconds: float) -> dict[str, Any]:
    """The result of a run, as the command prints it."""
    totals = summarize_described(describe(destination))
    return {
        "destination": str(destination),
        "bits_per_weight": totals.bits_per_weight,
        "outlier_share": totals.outlier_share,
        "seconds": seconds,
        "bytes_on_disk": bytes_on_disk(destination),
        "seconds_per_block": [block.seconds for block in blocks],
        "matrices": {name: matrix._asdict() for block in blocks for name, matrix in block.matrices.items()},
    }
