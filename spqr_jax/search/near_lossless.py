"""The smallest settings at which a model is near-lossless, found by bisection."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from pallas_kernels.errors import SpqrError
from spqr_jax.config import COMPACT, NEAR_LOSSLESS, SMALL, Method, SpqrConfig
from spqr_jax.measure.perplexity import cut_windows
from spqr_jax.search.sweep import Cell, sweep
from spqr_jax.search.target_bits import dividing, kernel_shapes
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.texts import random_windows

HELD_OUT_WINDOWS = 10
"""Most windows that `hold_out` keeps: 10 of 1024 tokens."""

HELD_OUT_LENGTH = 1024
"""Tokens of a held-out window, fewer where the model has fewer positions."""

HELD_OUT_SHARE = 4
"""At most one part in four of the text is held out."""

LARGEST_RISE = 0.01
"""The relative rise of perplexity that the paper calls near-lossless."""

SETTINGS: tuple[SpqrConfig, ...] = (
    *(replace(SMALL, outlier_threshold=threshold) for threshold in (0.8, 0.4, 0.2)),
    *(replace(COMPACT, outlier_threshold=threshold) for threshold in (1.2, 0.2)),
    *(replace(NEAR_LOSSLESS, outlier_threshold=threshold) for threshold in (0.4, 0.2, 0.1, 0.07)),
)
"""The candidates by size, from 3.5 to 5 bits per weight."""


class HeldOut(NamedTuple):
    """A text in two parts that do not overlap.

    Attributes:
      calibration_tokens: windows at random places of the first part.
      windows: the second part, cut into windows side by side, on which perplexity is measured.
    """

    calibration_tokens: Int[np.ndarray, "sequences length"]
    windows: Int[np.ndarray, "windows window"]


def hold_out(
    tokens: Int[np.ndarray, " tokens"],
    *,
    sequences: int,
    length: int,
    max_positions: int,
    seed: int = 0,
    first: int | None = None,
) -> HeldOut:
    """Splits a calibration text: its start is calibrated on, its end is held out to measure perplexity.

    The end is min(10, tokens // (4 window)) windows of window = min(1024, max_positions) tokens: at most 10,240 tokens,
    and at most a quarter of the text.

    Args:
      tokens: token ids of a running text.
      sequences: calibration windows to cut.
      length: tokens of each.
      max_positions: positions of the model, which limit a window.
      seed: of the places of the calibration windows.
      first: token in front of each window, see `Decoder.first_token`.

    Raises:
      SpqrError: the text is too short to hold one window out, or to cut a calibration window.

    Example:
      >>> calibration_tokens, windows = hold_out(np.arange(8192), sequences=32, length=512, max_positions=2048)
      >>> calibration_tokens.shape, windows.shape, int(windows[0, 0])
      ((32, 512), (2, 1024), 6144)
    """
    window = min(HELD_OUT_LENGTH, max_positions)
    count = min(HELD_OUT_WINDOWS, len(tokens) // (HELD_OUT_SHARE * window))
    if not count:
        raise SpqrError(
            f"the calibration text has {len(tokens)} tokens, but to hold a window of {window} out it needs "
            f"{HELD_OUT_SHARE * window}: give a longer text"
        )
    split = len(tokens) - count * window
    calibration = random_windows(tokens[:split], sequences, length, seed, first=first)
    return HeldOut(calibration, cut_windows(tokens[split:], window=window, first=first))


class Search(NamedTuple):
    """The result of a search.

    Attributes:
      config: the smallest settings within the limit; None if the largest exceed it.
      original_perplexity: of the model itself, on the held-out text.
      tried: results of `sweep`, in the order of the search.
      perplexity: of these settings on it; infinite without any.
    """

    config: SpqrConfig | None
    original_perplexity: float
    tried: list[dict[str, Any]]
    perplexity: float = math.inf


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
    """
    settings = dividing(kernel_shapes(source), settings)
    original, perplexity, tried = 0.0, math.inf, []
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
            high, perplexity = middle, result["perplexity"]
        else:
            low = middle + 1
    return Search(settings[low] if low < len(settings) else None, original, tried, perplexity)
