"""The work of `spqr quantize`: its inputs, the search for near-lossless settings, the run, and its result."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.calibration import calibration_tokens, running_text
from spqr_jax.cli.dry_run import MEASURED_BLOCKS, estimate
from spqr_jax.cli.progress import track_blocks
from spqr_jax.cli.settings import Settings, bytes_of
from spqr_jax.config import Method, SpqrConfig
from spqr_jax.rules import Plan
from spqr_jax.runtime.processes import is_first
from spqr_jax.search import near_lossless
from spqr_jax.search.mixed_bits import bits_target, file_target, quantize_mixed
from spqr_jax.search.target_bits import quantize_to_bits, settings_for
from spqr_jax.storage.checkpoint import describe
from spqr_jax.storage.directories import bytes_on_disk
from spqr_jax.storage.disk_to_disk import quantize_checkpoint
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import BlockReport, matrix_to_json, pooled_matrices
from spqr_jax.storage.totals import summarize_described


class Prepared(NamedTuple):
    """The inputs of a run.

    Attributes:
      config: what to quantize to.
      tokens: calibration tokens; None for round-to-nearest.
      quality: measured values of these settings, where they were searched for.
      started: `perf_counter` when the run's time began.
    """

    config: SpqrConfig
    tokens: Int[np.ndarray, "sequences length"] | None
    quality: dict[str, float] | None
    started: float


def configuration(source: ModelSource, settings: Settings) -> SpqrConfig:
    """The configuration that settings choose: by a size in bits, the largest that fits it."""
    if settings.by_size and settings.target_bits is not None:
        return settings.config(settings_for(source, settings.target_bits))
    return settings.config()


def prepare(
    source: ModelSource,
    destination: Path,
    settings: Settings,
    config: SpqrConfig,
    mesh: Mesh | None,
    *,
    texts: Sequence[str] | None,
    sequences: int,
    length: int,
    seed: int,
) -> Prepared:
    """Reads the calibration text and, with --near-lossless, searches for the settings.

    Args:
      source: the model.
      destination: directory of the checkpoint.
      settings: those that the user has asked for.
      config: the configuration that they choose, if it is not searched for.
      mesh: devices that share the work of a search.
      texts, sequences, length, seed: of the calibration, see `calibration_tokens`.

    Raises:
      SpqrError: the text cannot be used, or no configuration is near-lossless.
    """
    if settings.near_lossless:
        started = time.perf_counter()
        text = running_text(source.tokenizer, texts)
        return Prepared(*search(source, destination, text, sequences, length, seed, mesh), started)
    tokens = None
    if settings.method is not Method.RTN:
        tokens = calibration_tokens(source.tokenizer, texts, sequences, length, seed, source.model.first_token)
    return Prepared(config, tokens, None, time.perf_counter())


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
    held = near_lossless.hold_out(
        text,
        sequences=sequences,
        length=length,
        seed=seed,
        max_positions=positions,
        first=source.model.first_token,
    )
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
    source: ModelSource, destination: Path, prepared: Prepared, settings: Settings, **options: Any
) -> list[BlockReport] | None:
    """Quantizes a model, with progress on standard error.

    Args:
      source: the model.
      destination: directory of the checkpoint.
      prepared: configuration, calibration tokens and measured values.
      settings: those that the user has asked for, which may be a size to search.
      options: the others of `quantize_checkpoint`.

    Returns:
      A report per block; None in a process that is not the first of a distributed run.
    """
    quantize: Callable[..., list[BlockReport]] = quantize_checkpoint
    if settings.searches_size:
        quantize = _search_of(source, prepared.config, settings)
        options.pop("rules", None)  # the search has its own
    ends = Plan.of(prepared.config, options.get("rules", ())).ends(source.model)
    with track_blocks(source.model.config.num_layers, len(ends)) as show:
        options |= {"config": prepared.config, "quality": prepared.quality, "on_block": show if is_first() else None}
        blocks = quantize(source, destination, prepared.tokens, **options)
    return blocks if is_first() else None


def _search_of(source: ModelSource, config: SpqrConfig, settings: Settings) -> Callable[..., list[BlockReport]]:
    """The search for the size that the user has asked for."""
    if settings.target_size is not None:
        nbytes, ends = bytes_of(settings.target_size), settings.embedding_bits is None
        return partial(quantize_mixed, target=file_target(source, config, nbytes, ends=ends))
    assert settings.target_bits is not None
    if settings.mixed:
        return partial(quantize_mixed, target=bits_target(source, settings.target_bits))
    return partial(quantize_to_bits, target_bits=settings.target_bits)


def estimated(source: ModelSource, destination: Path, prepared: Prepared, **options: Any) -> dict[str, Any]:
    """The estimate of a run, with the progress of its measured blocks on standard error; see `dry_run.estimate`."""
    ends = Plan(prepared.config).ends(source.model)
    with track_blocks(min(MEASURED_BLOCKS, source.model.config.num_layers), len(ends)) as show:
        return estimate(source, destination, prepared.tokens, prepared.config, on_block=show, **options)


def describe_run(destination: Path, blocks: Sequence[BlockReport], seconds: float) -> dict[str, Any]:
    """The result of a run, as the command prints it."""
    description = describe(destination)
    totals = summarize_described(description)
    pooled = pooled_matrices(blocks)
    return {
        "destination": str(destination),
        **totals.sizes_with_files(bytes_on_disk(destination)),
        **({"matrices_of_experts_with_too_few_tokens": pooled} if pooled else {}),
        "seconds": seconds,
        "seconds_per_block": [block.seconds for block in blocks[: description["config"]["num_layers"]]],
        "matrices": {name: matrix_to_json(matrix) for block in blocks for name, matrix in block.matrices.items()},
    }
