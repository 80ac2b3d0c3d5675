"""The command `python -m pallas_kernels.tune`: measures tiles on this machine's GPU.

Results go to the user's cache directory (`tuning.directories`). Every result is written at once, so the command can be
interrupted and resumed: it skips tiles with a result. `--predict` orders the tiles beforehand, without a GPU.

Exit status: 0 done, 1 an error in one line, 2 wrong usage.
"""

import datetime
import functools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jaxtyping import Array
from rich.console import Console

from pallas_kernels.aot.costs import try_reports
from pallas_kernels.aot.formats import Format
from pallas_kernels.aot.gpus import GPUS
from pallas_kernels.aot.options import one_of, parse_shape
from pallas_kernels.backends.devices import device_kind
from pallas_kernels.backends.triton import PALLAS
from pallas_kernels.backends.triton.matmul import MATMULS
from pallas_kernels.benchmark.matrices import random_matrix
from pallas_kernels.benchmark.timing import Calls, compile_calls, measure
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.matmul import spqr_matmul
from pallas_kernels.tuning.measurements import (
    Setting,
    Trial,
    Trials,
    best_tile,
    file_of,
    read,
    trials_of,
    update,
    write,
)
from pallas_kernels.tuning.tiles import DEFAULT, Regime, Tile, candidates

FORM = Format(bits=3, group_size=16, stats_bits=3, outlier_percent=1)
SHAPES = ["4096x11008", "12288x4096", "22016x4096", "4096x4096", "11008x4096"]
"""The matrices of LLaMA-7B, with q, k and v fused, and gate and up."""
TOKENS: dict[Regime, int] = {"fma": 1, "mma": 16, "dequantize": 512}
CROSSOVERS: dict[int, tuple[Regime, Regime]] = {
    2: ("fma", "mma"),
    4: ("fma", "mma"),
    64: ("mma", "dequantize"),
    128: ("mma", "dequantize"),
    256: ("mma", "dequantize"),
}
"""Numbers of tokens at which the next kernel may become faster."""
FIRST = 3
"""Tiles of each setting that are measured before the crossovers."""
ROUGH_SECONDS = 15e-6
"""Expected time of a call on a GPU."""
MOST_INTERPRETED = 1 << 18
"""Weights of the largest matrix for interpreted kernels."""
MOST_ERROR = 1e-2
"""Largest ‖y − x ŵᵀ‖ / ‖x ŵᵀ‖ in bfloat16 of a correct tile; a worse one is recorded as an error."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
log = Console(stderr=True)


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=0, help="Time to spend; a running measurement is finished.")] = 120,
    shape: Annotated[
        list[Any], typer.Option(parser=parse_shape, metavar="OUTxIN", help="Matrices, the most important one first.")
    ] = SHAPES,
    predict: Annotated[
        str | None,
        typer.Option(
            parser=one_of(GPUS), metavar="|".join(GPUS), help="Predict the order of tiles for this GPU, without one."
        ),
    ] = None,
) -> None:
    """Measure the kernels with tiles of various sizes, the fastest predicted first.

    Results go to the cache directory: SPQR_JAX_CACHE_DIR, or the platform's. Products use them from then on. Without a
    GPU the kernels are interpreted: that tests the command on small matrices, and its times mean nothing.

    Example: python -m pallas_kernels.tune --seconds 120
    """
    try:
        if predict:
            predict_tiles(predict, shape[0])
        else:
            tune(seconds, shape)
    except (SpqrError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def predict_tiles(target: str, shape: tuple[int, int]) -> None:
    """Writes the predicted times of all candidates, the fastest first; among equals, fewest instructions first.

    Raises:
      SpqrError: the user's file cannot be written.
      ModuleNotFoundError: the compiler is not installed.
    """
    path = _announced(target)
    for regime, tokens in TOKENS.items():
        setting, tiles = Setting(regime, FORM.bits, shape, tokens), candidates(regime)
        results = try_reports([(target, FORM, tokens, shape)] * len(tiles), tiles)
        predictions: list[tuple[float, float, Tile]] = []
        for tile, kernels in zip(tiles, results, strict=True):
            if isinstance(kernels, ValueError):
                log.print(f"not predicted: {tile}: {kernels}")
            else:
                predicted = sum(kernel.predicted_us for kernel in kernels)
                predictions.append((predicted, sum(kernel.issue_us for kernel in kernels), tile))
        for predicted, _, tile in sorted(predictions, key=lambda prediction: prediction[:2]):
            _record(path, Trial(setting, tile, predicted_us=round(predicted, 3)))


def tune(seconds: float, shapes: Sequence[tuple[int, int]]) -> None:
    """Measures as many tiles as the time allows.

    Raises:
      SpqrError: there is no GPU and the matrices are large, or the user's file cannot be written.
      RuntimeError: the GPU no longer works.
    """
    largest = max(shapes, key=math.prod)
    if not PALLAS.available() and math.prod(largest) > MOST_INTERPRETED:
        out, columns = largest
        raise SpqrError(
            f"there is no supported GPU here, and interpreted kernels would take hours for {out}x{columns}; "
            "choose a small matrix, such as --shape 64x256"
        )
    deadline, path = time.monotonic() + seconds, _announced(device_kind())
    versions = {"jax": jax.__version__, "date": datetime.date.today().isoformat()}
    write(path, replace(read(path), device={"device_kind": device_kind(), **versions}))
    # Compile in parallel, because that takes most of the time. Measure one by one.
    ahead = os.cpu_count() or 1
    waiting: list[tuple[Setting, Tile, Future[Calls]]] = []
    plan = _plan(shapes)
    with ThreadPoolExecutor(ahead) as pool:
        while time.monotonic() < deadline:
            while len(waiting) < ahead and (following := next(plan, None)):
                waiting.append((*following, pool.submit(_compile, *following)))
            if not waiting:
                break
            setting, tile, calls = waiting.pop(0)
            trial = _trial(setting, tile, calls)
            _record(path, trial)
            log.print(_line(trial), soft_wrap=True)
        for *_, calls in waiting:
            calls.cancel()


def _plan(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[Setting, Tile]]:
    """Settings and tiles without a result, in the order of measuring."""
    kind = device_kind()
    done = {(trial.setting, trial.tile) for trial in trials_of(kind) if trial.measured_us or trial.error}
    settings = [Setting(regime, FORM.bits, shape, tokens) for shape in shapes for regime, tokens in TOKENS.items()]
    tiles = {regime: _ordered(regime, kind) for regime in TOKENS}

    def ranks(start: int, stop: int) -> Iterator[tuple[Setting, Tile]]:
        for rank in range(start, stop):
            for setting in settings:
                if rank < len(tiles[setting.regime]):
                    yield setting, tiles[setting.regime][rank]

    def crossovers() -> Iterator[tuple[Setting, Tile]]:
        w = FORM.tensor(shapes[0])
        for tokens, regimes in CROSSOVERS.items():
            for regime in regimes:
                yield Setting(regime, FORM.bits, shapes[0], tokens), best_tile(regime, w, TOKENS[regime], kind)

    for parts in (ranks(0, FIRST), crossovers(), ranks(FIRST, max(map(len, tiles.values())))):
        yield from (trial for trial in parts if trial not in done)


def _ordered(regime: Regime, kind: str) -> list[Tile]:
    """The default, then the other candidates in the order predicted for this GPU, or else for an H100."""
    for known in (kind, "h100"):
        trials = [trial for trial in trials_of(known) if trial.setting.regime == regime]
        predicted = [trial.tile for trial in trials if trial.predicted_us is not None]
        if predicted:
            return list(dict.fromkeys([DEFAULT[regime], *predicted]))
    return list(candidates(regime))


@functools.lru_cache(maxsize=4)
def _arguments(shape: tuple[int, int], tokens: int) -> tuple[Array, SpqrTensor, Array]:
    """Random activations and matrix, and their product by XLA."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, shape[1]), jnp.bfloat16)
    w = random_matrix(FORM, shape, seed=0)
    return x, w, spqr_matmul(x.astype(jnp.float32), w, implementation="xla")


def _compile(setting: Setting, tile: Tile) -> Calls:
    x, w, _ = _arguments(setting.shape, setting.tokens)
    interpret = not PALLAS.available()
    function = functools.partial(MATMULS[setting.regime], tile=tile, interpret=interpret)
    if interpret:
        return compile_calls(function, x, w, rough=1, copies=1)
    return compile_calls(function, x, w, rough=ROUGH_SECONDS)


def _trial(setting: Setting, tile: Tile, calls: Future[Calls]) -> Trial:
    """The measurement, or the error of the tile."""
    x, w, expected = _arguments(setting.shape, setting.tokens)
    try:
        program = calls.result()
        y = program.program(x, [w] * program.copies)[-1]
        error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        if not error < MOST_ERROR:
            return Trial(setting, tile, error=f"result is wrong by {error:.1e} of its size")
        return Trial(setting, tile, measured_us=round(1e6 * measure(program, x, w).seconds, 3))
    except Exception as error:  # Compilers raise errors of many types.
        if not _works():
            raise RuntimeError(f"the GPU no longer works after {setting} with {tile}: {error}") from None
        return Trial(setting, tile, error=str(error).partition("\n")[0][:200])


def _works() -> bool:
    try:
        return bool(jnp.ones(8).sum() == 8)
    except RuntimeError:
        return False


def _announced(device_kind: str) -> Path:
    """The user's file of a kind of GPU, after its path is printed."""
    path = file_of(device_kind)
    log.print(f"results: {path}", soft_wrap=True)
    return path


def _record(path: Path, trial: Trial) -> None:
    """Writes a trial into the file, which keeps the results of the same tile that the trial does not have."""
    before = read(path)
    trials = {(known.setting, known.tile): known for known in before.trials}
    key = trial.setting, trial.tile
    trials[key] = update(trials.get(key, trial), trial)
    write(path, Trials(before.device, tuple(trials.values())))


def _line(trial: Trial) -> str:
    setting, tile = trial.setting, trial.tile
    result = trial.error or f"{trial.measured_us:.2f} µs"
    out, columns = setting.shape
    sizes = f"{tile.sets} sets of {tile.rows} rows, {tile.columns} columns, {tile.steps} steps, {tile.warps} warps"
    return f"{setting.regime}, {out}x{columns}, tokens: {setting.tokens}; {sizes}: {result}"
