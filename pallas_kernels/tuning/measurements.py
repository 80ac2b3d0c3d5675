"""Which tiles were tried on a GPU, how fast they are said to be and were: one JSON file for each kind of GPU."""

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
from pallas_kernels.tuning.tiles import DEFAULT, Regime, Tile

DIRECTORY = Path(__file__).parent / "gpus"


@dataclass(frozen=True)
class Setting:
    """What a tile is chosen for.

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
      predicted_us: time of the kernel by its instructions and bytes, without a GPU; None where not asked for.
      measured_us: time of the whole product on the GPU; None where not measured.
      error: why it cannot be measured; None where nothing is known to be wrong.
    """

    setting: Setting
    tile: Tile
    predicted_us: float | None = None
    measured_us: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Trials:
    """What is known of one kind of GPU.

    Attributes:
      device: its name as JAX has it, and versions of what measured there; empty before that.
      trials: in the order in which they were made.
    """

    device: dict[str, str]
    trials: tuple[Trial, ...]


def file_of(device_kind: str) -> Path:
    """The file of a kind of GPU by its name: `h100.json` is that of every 'NVIDIA H100 80GB HBM3'.

    One that has none yet gets one of its full name.
    """
    name = re.sub(r"[^a-z0-9]", "", device_kind.lower())
    files = [path for path in DIRECTORY.glob("*.json") if path.stem in name]
    return max(files, key=lambda path: len(path.stem), default=DIRECTORY / f"{name}.json")


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
    """Writes trials, one in a line, in the place of what was there, or not at all."""
    lines = ",\n  ".join(json.dumps(dataclasses.asdict(trial)) for trial in trials.trials)
    text = f'{{"device": {json.dumps(trials.device)},\n "trials": [\n  {lines}\n]}}\n'
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)
    known.cache_clear()


def best_tile(regime: Regime, w: SpqrTensor, tokens: int, device_kind: str) -> Tile:
    """The tile measured to be the fastest where the matrix is most like this one; the default without measurements.

    Example:
      >>> best_tile("fma", packed, 1, "cpu")
      Tile(sets=4, rows=8, columns=32, steps=1, warps=1)
    """
    trials = [trial for trial in known(device_kind) if trial.setting.regime == regime]
    if not trials:
        return DEFAULT[regime]
    nearest = min((trial.setting for trial in trials), key=lambda setting: _distance(setting, w, tokens))
    return min((trial for trial in trials if trial.setting == nearest), key=_measured).tile


def most_tokens(first: Regime, second: Regime, device_kind: str) -> int | None:
    """The most tokens for which the first kernel is measured to be no slower than the second.

    Both must have been measured with the same numbers of tokens, on the same matrices; None where they have not.
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
    """The trials that were measured on this kind of GPU."""
    return tuple(trial for trial in read(file_of(device_kind)).trials if trial.measured_us is not None)


def _measured(trial: Trial) -> float:
    assert trial.measured_us is not None
    return trial.measured_us


def _distance(setting: Setting, w: SpqrTensor, tokens: int) -> float:
    """How unlike two settings are: doubling rows, columns or tokens counts 1, other bits more than that can."""
    ratios = zip((*setting.shape, setting.tokens), (*w.shape, tokens), strict=True)
    return sum(abs(math.log2(a / b)) for a, b in ratios) + (100 if setting.bits != w.bits else 0)


def _trial(row: dict[str, Any]) -> Trial:
    setting = {**row["setting"], "shape": tuple(row["setting"]["shape"])}
    return Trial(Setting(**setting), Tile(**row["tile"]), row["predicted_us"], row["measured_us"], row["error"])
