"""Speed and memory of quantization.

It measures the solver on random matrices of SmolLM2's four shapes, the whole model (32 × 512 calibration tokens), and
the growth with size. The official times were measured once, in PyTorch on another machine with 2 cores, so a ratio to
them holds only on such a machine.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from converters import find_smollm2, from_pretrained
from spqr_jax.benchmark.growth import Growth, growths
from spqr_jax.cli import console
from spqr_jax.cli.models import encode
from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.model import quantize_blocks
from spqr_jax.quantization.solver import quantize_shared
from spqr_jax.runtime.memory import peak_bytes
from spqr_jax.storage.totals import summarize
from spqr_jax.texts import REFERENCE_STARTS, wikitext2, windows_at

OFFICIAL_SECONDS = {(192, 576): 0.37, (576, 576): 0.43, (576, 1536): 1.42, (1536, 576): 0.76}
OFFICIAL_MODEL_SECONDS = 196.0
REPETITIONS = 10


class SolverRow(NamedTuple):
    """Times of the solver on one matrix `[out, in]`.

    Attributes:
      shape: (out, in).
      seconds: median of repeated runs.
      compile_seconds: additional time of the first run.
      official_seconds: time of the official code.
    """

    shape: tuple[int, int]
    seconds: float
    compile_seconds: float
    official_seconds: float


def solver_row(shape: tuple[int, int]) -> SolverRow:
    """Times the solver on a matrix of one of SmolLM2's shapes."""
    seconds, first = solver_seconds(shape)
    return SolverRow(shape, seconds, first - seconds, OFFICIAL_SECONDS[shape])


def solver_seconds(shape: tuple[int, int]) -> tuple[float, float]:
    """Times the solver (factorization, columns, packing) on a random matrix and Hessian.

    Returns:
      the median seconds of repeated runs, and the seconds of the first run, which compiles.
    """
    columns = shape[1]
    rng = np.random.default_rng(0)
    weight = jnp.asarray(0.05 * rng.standard_t(5, size=shape), jnp.float32)
    inputs = rng.normal(size=(4 * columns, columns)) * np.exp(0.5 * rng.normal(size=columns))
    hessian = jnp.asarray(inputs.T @ inputs, jnp.float32)

    def solve() -> None:
        jax.block_until_ready(quantize_shared((weight,), hessian, SpqrConfig()))

    first = timed(solve)
    return float(np.median([timed(solve) for _ in range(REPETITIONS)])), first


def timed(function: Callable[[], object]) -> float:
    """Wall time of a call in seconds.

    Example:
      >>> timed(lambda: sum(range(1000))) > 0
      True
    """
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def whole_model() -> dict[str, float]:
    """Quantizes SmolLM2 with the default configuration. The times include compilation."""
    model, params, tokenizer = from_pretrained(find_smollm2(), dtype=np.float16)
    ids = np.array(encode(tokenizer, wikitext2("valid")))
    tokens = windows_at(ids, np.array(REFERENCE_STARTS), 512)
    blocks, solver_seconds = dict(params), 0.0
    started = time.perf_counter()
    steps = quantize_blocks(params, tokens, model=model, config=SpqrConfig())
    for block in console.track(steps, model.config.num_layers, "quantizing blocks"):
        blocks[block.name] = block.params
        solver_seconds += sum(matrix.seconds for matrix in block.report.values())
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "solver_seconds": solver_seconds,
        "official_seconds": OFFICIAL_MODEL_SECONDS,
        "bits_per_weight": summarize(blocks).bits_per_weight,
        "outlier_share": summarize(blocks).outlier_share,
        "peak_gigabytes": peak_bytes() / 1e9,
    }


def measure_and_print(as_json: bool) -> None:
    """Measures the whole model, the solver and the growth with size, and prints the results."""
    # Start with the whole model, so that its time includes all compilation and its peak memory nothing else.
    model = whole_model()
    jax.clear_caches()
    rows = [solver_row(shape) for shape in OFFICIAL_SECONDS]
    grown = growths(lambda shape: solver_seconds(shape)[0], timed)
    if as_json:
        report = {"solver": [row._asdict() for row in rows], "model": model, "growth": [g._asdict() for g in grown]}
        console.emit(report, as_json=True)
        return
    table = Table("matrix (out x in)", "seconds", "compile", "official", "times as fast", title="solver")
    for row in rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        ratio = row.official_seconds / row.seconds
        table.add_row(
            shape, f"{row.seconds:.3f}", f"{row.compile_seconds:.1f}", f"{row.official_seconds:.2f}", f"{ratio:.1f}"
        )
    Console().print(table)
    Console().print(growth_table(grown))
    console.emit(model, as_json=False)


def growth_table(grown: Sequence[Growth]) -> Table:
    """The table of fitted exponents a of time ~ size^a, one row per dimension."""
    table = Table("of", "sizes", "seconds", "a", "a of the operations", "", title="growth")
    for growth in grown:
        table.add_row(
            growth.of,
            ", ".join(map(str, growth.sizes)),
            ", ".join(f"{seconds:.3g}" for seconds in growth.seconds),
            f"{growth.exponent:.2f}",
            f"{growth.operations_exponent:.2f}",
            "faster than the operations" if growth.is_worse else "",
        )
    return table
