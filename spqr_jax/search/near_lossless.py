"""The smallest settings at which a model is near-lossless, found by bisection."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from spqr_jax.config import COMPACT, NEAR_LOSSLESS, SMALL, Method, SpqrConfig
from spqr_jax.search.sweep import Cell, sweep
from spqr_jax.search.target_bits import dividing, kernel_shapes
from spqr_jax.storage.model_source import ModelSource

LARGEST_RISE = 0.01
"""The relative rise of perplexity that the paper calls near-lossless."""

SETTINGS: tuple[SpqrConfig, ...] = (
    *(replace(SMALL, outlier_threshold=threshold) for threshold in (0.8, 0.4, 0.2)),
    *(replace(COMPACT, outlier_threshold=threshold) for threshold in (1.2, 0.2)),
    *(replace(NEAR_LOSSLESS, outlier_threshold=threshold) for threshold in (0.4, 0.2, 0.1, 0.07)),
)
"""The candidates by size, from 3.5 to 5 bits per weight."""


class Search(NamedTuple):
    """The result of a search.

    Attributes:
      config: the smallest settings within the limit; None if the largest exceed it.
      original_perplexity: of the model itself, on the held-out text.
      tried: results of `sweep`, in the order of the search.
    """

    config: SpqrConfig | None
    original_perplexity: float
    tried: list[dict[str, Any]]


def smallest_near_lossless(
    source: ModelSource,
    directory: Path,
    calibration_tokens: Int[np.ndarray, "sequences tokens"],
    windows: Int[np.ndarray, "windows window"],
    *,
    settings: Sequence[SpqrConfig] = SETTINGS,
    mesh: Mesh | None = None,
) -> Search:
    """The first settings whose perplexity on held-out text rises by less than 1 %, by bisection.

    Assumes that more bits never raise the perplexity, so that log₂ n of n settings are measured.

    Args:
      source: the model.
      directory: the directory of results, see `sweep`.
      calibration_tokens: token ids of sequences of equal length.
      windows: token ids of other text, see `cut_windows`.
      settings: the candidates by size; those whose groups do not divide the model's features or rows are left out.
      mesh: devices that share the work of quantizing.

    Raises:
      SpqrError, CheckpointError: as for `sweep`.

    Example:
      >>> settings = [replace(COMPACT, bits=8)]
      >>> found = smallest_near_lossless(source, Path("search"), calibration, calibration, settings=settings)
      >>> found.config.bits, len(found.tried)
      (8, 1)
    """
    settings = dividing(kernel_shapes(source), settings)
    original, tried = 0.0, []
    # Settings before `low` exceed the limit; those from `high` on are within it.
    low, high = 0, len(settings)
    while low < high:
        middle = (low + high) // 2
        before, result = sweep(
            source, directory, [Cell(Method.SPQR, settings[middle])], calibration_tokens, windows, mesh=mesh
        )
        original = before["perplexity"]
        tried.append(result)
        if result["perplexity"] < (1 + LARGEST_RISE) * original:
            high = middle
        else:
            low = middle + 1
    return Search(settings[low] if low < len(settings) else None, original, tried)
