"""How long a call takes on JAX's device, without the time that it takes to get there.

Many calls are one program: a loop, each of whose steps calls the function once with every one of several copies of the
matrix, in turn. By the time that a copy comes again, the cache no longer has it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

ROTATED_BYTES = 2 * 126 << 20
"""Bytes of all copies: twice the largest cache of a GPU, the B200's; an H100's has 50 MB."""
MOST_COPIES = 16
SAMPLES = 9
SAMPLE_SECONDS = 0.01
"""About what one measurement takes: much more than to start a program."""
MOST_REPETITIONS = 1000

COPIED_BYTES = {"gpu": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
      seconds: the median over executions of the program.
      quartiles: the lower and the upper one.
    """

    seconds: float
    quartiles: tuple[float, float]


def seconds_per_call(function: Callable[[Array, Any], Any], x: Array, w: Any, *, copies: int | None = None) -> Timing:
    """Measures what `function(x, w)` takes.

    Args:
      function: can be jitted; it is called with the same x and other copies of w.
      x: activations.
      w: a pytree of arrays.
      copies: number of copies of w; None is as many as make up `ROTATED_BYTES`, up to `MOST_COPIES`.

    Example:
      >>> seconds_per_call(spqr_matmul, x, packed).seconds
      7.3e-06
    """
    call = jax.jit(function)
    rough = min(_seconds(call, x, w) for _ in range(4))
    return measure(compile_calls(call, x, w, rough, copies=copies), x, w)


@dataclass(frozen=True)
class Calls:
    """A program that calls a function so many times with each of so many matrices."""

    program: Callable[[Array, Sequence[Any]], list[Any]]
    copies: int
    steps: int


def compile_calls(
    function: Callable[[Array, Any], Any], x: Array, w: Any, rough: float, *, copies: int | None = None
) -> Calls:
    """The program that `measure` runs, where a call takes about `rough` seconds; several threads can compile some."""
    if copies is None:
        copies = copies_for(sum(leaf.nbytes for leaf in jax.tree.leaves(w)))
    steps = repetitions(rough * copies)
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "gpu":
        # In CUDA graphs, calls that could run at once would do so.
        options["xla_gpu_command_buffer_scheduling_mode"] = "SERIALIZE"
    program = jax.jit(repeated(function, steps)).lower(x, [w] * copies).compile(compiler_options=options)
    return Calls(program, copies, steps)


def measure(calls: Calls, x: Array, w: Any) -> Timing:
    """Runs a program several times, and divides its time by the number of its calls."""
    matrices = [jax.tree.map(jnp.copy, w) for _ in range(calls.copies)]
    # Where calls take less than was thought, several programs are queued, so that what starts them does not count.
    executions = repetitions(min(_seconds(calls.program, x, matrices) for _ in range(2)))

    def sample() -> list[Any]:
        for _ in range(executions):
            results = calls.program(x, matrices)
        return results

    return summary([_seconds(sample) / (executions * calls.steps * calls.copies) for _ in range(SAMPLES)])


def repetitions(seconds: float) -> int:
    """How often what takes so long is repeated in one measurement."""
    return int(np.clip(SAMPLE_SECONDS / seconds, 1, MOST_REPETITIONS))


def summary(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of several measurements of the same."""
    lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(float(median), (float(lower), float(upper)))


def copies_for(nbytes: int) -> int:
    """How many copies of a matrix of so many bytes make up `ROTATED_BYTES`, up to `MOST_COPIES`."""
    return min(-(-ROTATED_BYTES // nbytes), MOST_COPIES)


def repeated(function: Callable[[Array, Any], Any], steps: int) -> Callable[[Array, Sequence[Any]], list[Any]]:
    """A function of x and several matrices that calls another one with each of these, so many times.

    Every result is used, and what every call gets depends on the call before: so, compiled, none is left out, and no
    part of one is moved out of the loop.

    Example:
      >>> jax.jit(repeated(spqr_matmul, steps=10))(x, [first, second])  # 20 products
    """

    def program(x: Array, matrices: Sequence[Any]) -> list[Any]:
        def step(_: Array, carry: tuple[Array, list[Any]]) -> tuple[Array, list[Any]]:
            x, results = carry
            for i, w in enumerate(matrices):
                # Number −1, the last of the step before, for the first.
                x, w, _ = jax.lax.optimization_barrier((x, w, results[i - 1]))
                results = [*results[:i], function(x, w), *results[i + 1 :]]
            return x, results

        empty = [jax.tree.map(jnp.zeros_like, jax.eval_shape(function, x, w)) for w in matrices]
        return jax.lax.fori_loop(0, steps, step, (x, empty))[1]

    return program


def bandwidth() -> float:
    """Bytes per second that the device reads and writes: those of multiplying a large array by a number.

    Example:
      >>> bandwidth()  # an H100
      2.9e12
    """
    nbytes = COPIED_BYTES[jax.default_backend()]
    large = jnp.ones(nbytes // 2, jnp.bfloat16)
    timing = seconds_per_call(jnp.multiply, jnp.bfloat16(0.5), large, copies=1)
    return 2 * nbytes / timing.seconds


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - started
