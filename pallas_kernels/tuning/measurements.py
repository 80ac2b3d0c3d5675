"""Trials of tiles, predicted and measured: one JSON file for each kind of GPU.

The package ships files, which nothing writes to. A user's own trials go to the cache directory and take precedence.
"""

import dataclasses
import functools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.directories import PACKAGED, VARIABLE, tiles_directory
from pallas_kernels.tuning.tiles import DEFAULT, Regime, Tile


@dataclass(frozen=True)
class Setting:
    """A product that a tile is chosen for.

    Attributes:
      regime: the kernel.
      bits: width of a weight code.
      shape: (out, in).
      tokens: rows of the activations.
    """

    regime: Regime
    bits: int
    shape: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class Trial:
    """One tile for one setting.

    Attributes:
      predicted_us: time of the kernel by its instructions and bytes, in µs; None where not predicted.
      measured_us: time of the whole product on the GPU, in µs; None where not measured.
      error: why it cannot be measured; None where nothing is known to be wrong.
    """

    setting: Setting
    tile: Tile
    predicted_us: float | None = None
    measured_us: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Trials:
    """The content of one file: trials on one kind of GPU.

    Attributes:
      device: its name as JAX has it, with JAX's version and the date of measuring; empty before that.
      trials: in the order in which they were made.
    """

    device: dict[str, str]
    trials: tuple[Trial, ...]


def file_of(device_kind: str) -> Path:
    """The user's file of a kind of GPU by its name: `h100.json` is that of every 'NVIDIA H100 80GB HBM3'.

    It has the name of the package's file. A kind without one gets a file of its full name.

    Example:
      >>> file_of("NVIDIA H100 80GB HBM3").name, file_of("NVIDIA H200").name
      ('h100.json', 'nvidiah200.json')
    """
    directory = tiles_directory()
    known = _matching(directory, device_kind) or _matching(PACKAGED, device_kind)
    return directory / (known.name if known else f"{_letters(device_kind)}.json")


def trials_of(device_kind: str) -> tuple[Trial, ...]:
    """All trials of a kind of GPU: the user's, then those of the package.

    A user's result replaces the package's for one setting and tile. A field that the user's trial does not have, such
    as a prediction, is the package's.

    Raises:
      SpqrError: a file is damaged.
    """
    packaged = _matching(PACKAGED, device_kind)
    trials = read(file_of(device_kind)).trials + (read(packaged).trials if packaged else ())
    merged: dict[tuple[Setting, Tile], Trial] = {}
    for trial in trials:
        key = trial.setting, trial.tile
        merged[key] = trial if key not in merged else update(trial, merged[key])
    return tuple(merged.values())


def update(old: Trial, new: Trial) -> Trial:
    """The newer of two trials of one tile, with what only the older one has; a tile that fails now is not measured."""
    measured = old.measured_us if new.measured_us is None else new.measured_us
    return Trial(
        new.setting,
        new.tile,
        predicted_us=old.predicted_us if new.predicted_us is None else new.predicted_us,
        measured_us=None if new.error else measured,
        error=new.error,
    )


def read(path: Path) -> Trials:
    """The trials in a file; none where there is no file.

    Raises:
      SpqrError: the file is damaged.
    """
    if not path.exists():
        return Trials({}, ())
    try:
        content = json.loads(path.read_text())
        return Trials(dict(content["device"]), tuple(map(_trial, content["trials"])))
    except (KeyError, TypeError, ValueError) as error:
        raise SpqrError(f"{path} is not a file of trials ({error!r}); delete it, or restore it") from None


def write(path: Path, trials: Trials) -> None:
    """Replaces a file atomically, with one trial in a line.

    Raises:
      SpqrError: the file cannot be written.
    """
    lines = ",\n  ".join(json.dumps(dataclasses.asdict(trial)) for trial in trials.trials)
    text = f'{{"device": {json.dumps(trials.device)},\n "trials": [\n  {lines}\n]}}\n'
    unfinished = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text)
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or error
        raise SpqrError(f"{path} cannot be written ({reason}); set {VARIABLE} to a directory that can be") from None
    known.cache_clear()


def best_tile(regime: Regime, w: SpqrTensor, tokens: int, device_kind: str) -> Tile:
    """The fastest tile measured at the nearest setting; the default where nothing is measured.

    Example:
      >>> best_tile("fma", packed, 1, "cpu")
      Tile(sets=1, rows=8, columns=64, steps=1, warps=1)
    """
    trials = [trial for trial in known(device_kind) if trial.setting.regime == regime]
    if not trials:
        return DEFAULT[regime]
    nearest = min((trial.setting for trial in trials), key=lambda setting: _distance(setting, w, tokens))
    return min((trial for trial in trials if trial.setting == nearest), key=_measured).tile


def most_tokens(first: Regime, second: Regime, device_kind: str) -> int | None:
    """The largest number of tokens for which the first kernel was no slower than the second.

    None unless both were measured with equal numbers of tokens on equal matrices.
    """
    best: dict[Setting, float] = {}
    for trial in known(device_kind):
        best[trial.setting] = min(_measured(trial), best.get(trial.setting, math.inf))
    ratios: dict[int, list[float]] = {}
    for setting, time in best.items():
        rival = best.get(dataclasses.replace(setting, regime=second))
        if setting.regime == first and rival is not None:
            ratios.setdefault(setting.tokens, []).append(math.log(time / rival))
    most = None
    for tokens, logs in sorted(ratios.items()):
        if sum(logs) > 0:
            return tokens - 1 if most is None else most
        most = tokens
    return most


@functools.cache
def known(device_kind: str) -> tuple[Trial, ...]:
    """The trials that were measured on this kind of GPU; cached until `write`."""
    return tuple(trial for trial in trials_of(device_kind) if trial.measured_us is not None)


def _matching(directory: Path, device_kind: str) -> Path | None:
    """The file of a directory with the longest name that is part of the GPU's; None without one."""
    name = _letters(device_kind)
    files = [path for path in directory.glob("*.json") if path.stem in name]
    return max(files, key=lambda path: len(path.stem), default=None)


def _letters(device_kind: str) -> str:
    return re.sub(r"[^a-z0-9]", "", device_kind.lower())


def _measured(trial: Trial) -> float:
    assert trial.measured_us is not None
    return trial.measured_us


def _distance(setting: Setting, w: SpqrTensor, tokens: int) -> float:
    """Distance of a product from a setting: Σ |log2 of the ratios of rows, columns, tokens|; 100 for other bits."""
    ratios = zip((*setting.shape, setting.tokens), (*w.shape, tokens), strict=True)
    return sum(abs(math.log2(a / b)) for a, b in ratios) + (100 if setting.bits != w.bits else 0)


def _trial(row: dict[str, Any]) -> Trial:
    setting = {**row["setting"], "shape": tuple(row["setting"]["shape"])}
    return Trial(Setting(**setting), Tile(**row["tile"]), row["predicted_us"], row["measured_us"], row["error"])
