"""Timing of one call on JAX's device, without the latency of dispatch.

One program makes many calls. It is a loop whose steps call the function once with each of several copies of the matrix.
When a copy is used again, the cache no longer holds it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

ROTATED_BYTES = 2 * 126 << 20
"""Bytes of all copies: twice 126 MB, the largest cache of a GPU (B200). An H100 has 50 MB."""
MOST_COPIES = 16
SAMPLES = 9
SAMPLE_SECONDS = 0.01
"""Approximate duration of one sample, far longer than dispatching a program."""
MOST_REPETITIONS = 1000

COPIED_BYTES = {"gpu": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
      seconds: median over the samples.
      quartiles: lower and upper quartile.
    """

    seconds: float
    quartiles: tuple[float, float]


def seconds_per_call(
    function: Callable[[Array, PyTree], PyTree], x: Array, w: PyTree, *, copies: int | None = None
) -> Timing:
    """Times `function(x, w)`.

    Args:
      function: a function that can be jitted. It is called with the same x and with copies of w.
      x: activations.
      w: a pytree of arrays.
      copies: number of copies of w. None: as many as fill `ROTATED_BYTES`, at most `MOST_COPIES`.

    Example:
      >>> timing = seconds_per_call(jnp.dot, x, kernel, copies=2)
      >>> 0 < timing.quartiles[0] <= timing.seconds
      True
    """
    call = jax.jit(function)
    rough = min(_seconds(call, x, w) for _ in range(4))
    return measure(compile_calls(call, x, w, rough, copies=copies), x, w)


@dataclass(frozen=True)
class Calls:
    """A program that calls a function `steps` times with each of `copies` matrices."""

    program: Callable[[Array, Sequence[PyTree]], list[PyTree]]
    copies: int
    steps: int


def compile_calls(
    function: Callable[[Array, PyTree], PyTree], x: Array, w: PyTree, rough: float, *, copies: int | None = None
) -> Calls:
    """Compiles the program that `measure` runs. Thread-safe.

    Args:
      function: a function that can be jitted.
      x: activations.
      w: a pytree of arrays.
      rough: estimated seconds per call, which decide the number of steps.
      copies: number of copies of w, as in `seconds_per_call`.
    """
    if copies is None:
        copies = copies_for(sum(leaf.nbytes for leaf in jax.tree.leaves(w)))
    steps = repetitions(rough * copies)
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "gpu":
        # Otherwise a CUDA graph runs independent calls concurrently.
        options["xla_gpu_command_buffer_scheduling_mode"] = "SERIALIZE"
    program = jax.jit(repeated(function, steps)).lower(x, [w] * copies).compile(compiler_options=options)
    return Calls(program, copies, steps)


def measure(calls: Calls, x: Array, w: PyTree) -> Timing:
    """Runs a program several times and divides its time by the number of its calls."""
    matrices = [jax.tree.map(jnp.copy, w) for _ in range(calls.copies)]
    # If calls are faster than estimated, queue several programs to hide the latency of dispatch.
    executions = repetitions(min(_seconds(calls.program, x, matrices) for _ in range(2)))

    def sample() -> list[PyTree]:
        for _ in range(executions):
            results = calls.program(x, matrices)
        return results

    return summary([_seconds(sample) / (executions * calls.steps * calls.copies) for _ in range(SAMPLES)])


def repetitions(seconds: float) -> int:
    """The number of repetitions that fill one sample, at least 1 and at most `MOST_REPETITIONS`.

    Example:
      >>> repetitions(0.0025)
      4
    """
    return int(np.clip(SAMPLE_SECONDS / seconds, 1, MOST_REPETITIONS))


def summary(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of samples.

    Example:
      >>> summary([1.0, 2.0, 3.0])
      Timing(seconds=2.0, quartiles=(1.5, 2.5))
    """
    lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(float(median), (float(lower), float(upper)))


def copies_for(nbytes: int) -> int:
    """The number of copies of a matrix of `nbytes` that fill `ROTATED_BYTES`, at most `MOST_COPIES`.

    Example:
      >>> copies_for(64 << 20)
      4
    """
    return min(-(-ROTATED_BYTES // nbytes), MOST_COPIES)


def repeated(
    function: Callable[[Array, PyTree], PyTree], steps: int
) -> Callable[[Array, Sequence[PyTree]], list[PyTree]]:
    """A function of x and several matrices that calls `function` `steps` times with each matrix.

    All results are used, and the arguments of each call depend on the previous call. The compiler can therefore neither
    drop a call nor move a part of one out of the loop.

    Example:
      >>> results = jax.jit(repeated(jnp.dot, steps=10))(x, [kernel, kernel])  # 20 products
      >>> len(results)
      2
    """

    def program(x: Array, matrices: Sequence[PyTree]) -> list[PyTree]:
        def step(_: Array, carry: tuple[Array, list[PyTree]]) -> tuple[Array, list[PyTree]]:
            x, results = carry
            for i, w in enumerate(matrices):
                # For the first matrix, results[-1] is the last result of the previous step.
                x, w, _ = jax.lax.optimization_barrier((x, w, results[i - 1]))
                results = [*results[:i], function(x, w), *results[i + 1 :]]
            return x, results

        empty = [jax.tree.map(jnp.zeros_like, jax.eval_shape(function, x, w)) for w in matrices]
        return jax.lax.fori_loop(0, steps, step, (x, empty))[1]

    return program


def bandwidth() -> float:
    """Bytes per second that the device reads and writes while it multiplies a large array by a number.

    Example:
      >>> bandwidth() > 1e6
      True
    """
    nbytes = COPIED_BYTES[jax.default_backend()]
    large = jnp.ones(nbytes // 2, jnp.bfloat16)
    timing = seconds_per_call(jnp.multiply, jnp.bfloat16(0.5), large, copies=1)
    return 2 * nbytes / timing.seconds


def _seconds(function: Callable[..., PyTree], *args: PyTree) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - started
