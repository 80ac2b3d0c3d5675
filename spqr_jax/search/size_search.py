"""Quantizing a model again and again until it has a wanted size, in a search that can be interrupted and resumed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pallas_kernels.errors import SpqrError
from spqr_jax.config import Rules, SpqrConfig
from spqr_jax.storage.checkpoint import check_destination, describe
from spqr_jax.storage.digests import digest
from spqr_jax.storage.directories import write_text
from spqr_jax.storage.disk_to_disk import quantize_checkpoint
from spqr_jax.storage.json_files import read_json
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.paths import resolved
from spqr_jax.storage.record import BlockReport
from spqr_jax.storage.totals import summarize_described

TOLERANCE = 0.02
"""The largest difference between measured and target bits per weight."""

MOST_RUNS = 4
"""The most quantizations in a search."""


class Try(NamedTuple):
    """One quantization of a search.

    Attributes:
      amount: the number that the search changes, such as an outlier threshold.
      size: measured, in the unit of the goal.
    """

    amount: float
    size: float


@dataclass(frozen=True)
class Goal:
    """The wanted size.

    Attributes:
      smallest, largest: the sizes that end a search.
      unit: its name in messages.
      measure: the size of a checkpoint.
    """

    smallest: float
    largest: float
    unit: str
    measure: Callable[[Path], float]


class Choice(NamedTuple):
    """The next try of a search.

    Attributes:
      amount: the number that the search changes.
      config, rules: the settings at this amount.
    """

    amount: float
    config: SpqrConfig
    rules: Rules = ()


def goal_of_bits(target: float) -> Goal:
    """Bits per weight of a model's blocks, within 0.02 of a target.

    Example:
      >>> goal_of_bits(3.9).largest
      3.92
    """

    def measure(checkpoint: Path) -> float:
        return summarize_described(describe(checkpoint)).bits_per_weight

    return Goal(target - TOLERANCE, target + TOLERANCE, "bits per weight", measure)


def quantize_to_size(
    source: ModelSource,
    destination: Path,
    calibration_tokens: Int[np.ndarray, "sequences tokens"],
    *,
    goal: Goal,
    survey: Callable[[], Any],
    choose: Callable[[Any, Sequence[Try]], Choice],
    description: Mapping[str, Any],
    overwrite: bool = False,
    **options: Any,
) -> list[BlockReport]:
    """Quantizes a model until its size is the wanted one, at most `MOST_RUNS` times.

    `<destination>.budget.json` keeps the survey and the tries: the same call resumes an interrupted search.

    Args:
      source: the model.
      destination: directory of the checkpoint.
      calibration_tokens: token ids of sequences of equal length.
      goal: the wanted size.
      survey: studies the model, once; its result can be written as JSON.
      choose: from that result, as JSON has it, and the tries so far: what to try next.
      description: tells this search from others, beside the calibration tokens; JSON.
      overwrite: replace an existing checkpoint.
      options: further arguments of `quantize_checkpoint`.

    Raises:
      SpqrError: no try had that size; or as for `quantize_checkpoint`.
    """
    destination = resolved(destination)
    notes = destination.with_name(f"{destination.name}.budget.json")
    search = json.loads(json.dumps({**description, "calibration": digest(calibration_tokens)}))
    found = _read_notes(notes, search)
    # An existing checkpoint may be of this search.
    overwrite = overwrite or found is not None
    if found is None:
        check_destination(destination, overwrite=overwrite)  # before long work
    surveyed, tried = found or (json.loads(json.dumps(survey())), [])
    while len(tried) < MOST_RUNS:
        choice = choose(surveyed, tried)
        write_text(notes, json.dumps(search | {"survey": surveyed, "tried": tried}))
        blocks = quantize_checkpoint(
            source,
            destination,
            calibration_tokens,
            config=choice.config,
            rules=choice.rules,
            overwrite=overwrite,
            **options,
        )
        size = goal.measure(destination)
        if goal.smallest <= size <= goal.largest:
            notes.unlink()
            return blocks
        tried, overwrite = [*tried, Try(choice.amount, size)], True
    raise SpqrError(
        f"{MOST_RUNS} tries did not give {goal.smallest:.6g} to {goal.largest:.6g} {goal.unit}, but "
        + ", ".join(f"{size:.6g}" for _, size in tried)
    )


def _read_notes(notes: Path, search: dict[str, Any]) -> tuple[Any, list[Try]] | None:
    """The survey and the tries of an interrupted run of the same search."""
    found = read_json(notes) if notes.is_file() else {}
    if {name: found.get(name) for name in search} != search or not {"survey", "tried"} <= found.keys():
        return None
    return found["survey"], [Try(*one) for one in found["tried"]]
