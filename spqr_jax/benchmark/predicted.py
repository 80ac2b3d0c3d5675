"""Predicted decoding on an absent GPU: the sum over the kernels of the decode step, compiled ahead of time."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.aot import GPUS, Format, Gpu, KernelReport, report_all
from pallas_kernels.aot.compiler import Program, compile_program, run_apart
from pallas_kernels.errors import SpqrError
from spqr_jax import generation
from spqr_jax.benchmark.decode import BATCHES, PREFIXES, empty_row, start
from spqr_jax.benchmark.random_model import MODELS, fused_shapes, random_params
from spqr_jax.benchmark.results import Row
from spqr_jax.generation import Policy
from spqr_jax.models import Decoder

OURS = "spqr_"
"""Prefix of the names of this project's kernels."""
GAP = 1e-6
"""Seconds from the end of one kernel to the start of the next, an assumption."""

ASSUMPTIONS = (
    "nothing here is measured: the decode step was compiled for the GPU, and its kernels are added up",
    "a kernel of this project takes the larger of its instructions over the issue rate and its bytes over the "
    "bandwidth, as python -m pallas_kernels.aot reports it",
    "any other kernel takes the bytes that it reads and writes over the bandwidth, whatever it computes",
    f"between two kernels pass {1e6 * GAP:g} µs, a guess, counted with the rest",
    "attention is reading keys and values of all slots once",
    "the time to the first token is not predicted",
)


@dataclass(frozen=True)
class Step:
    """The kernel launches of one decode step.

    Attributes:
      launches: number of launches.
      ours: number of launches of this project's kernels.
      other_bytes: bytes that the other kernels read and write.
    """

    launches: int
    ours: int
    other_bytes: int


def predicted_rows(
    name: str,
    form: Format,
    target: str,
    *,
    batches: Sequence[int] = BATCHES,
    prefixes: Sequence[int] = PREFIXES,
) -> Iterator[Row]:
    """Predicts and yields rows of a model in a packed format and in bfloat16.

    Args:
      name: one of `MODELS`.
      form: format of the packed matrices.
      target: one of `GPUS`.
      batches: numbers of sequences.
      prefixes: lengths of the prompts.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: the format does not support the sizes of the model, or the compiled program has unexpected kernels.
    """
    model, gpu = MODELS[name], GPUS[target]
    shapes = list(fused_shapes(model).values())
    reports = iter(report_all([(target, form, batch, shape) for batch in batches for shape in shapes]))
    ours = {
        batch: [kernel for _ in shapes for kernel in next(reports) if kernel.kernel.startswith(OURS)]
        for batch in batches
    }
    settings = list(itertools.product(batches, (form, None), prefixes))
    steps = run_apart(functools.partial(compiled_step, name, target), *zip(*settings, strict=True))
    for (batch, packed, prefix), step in zip(settings, steps, strict=True):
        row = empty_row(model, packed, batch, prefix, "gpu")
        yield _predicted(row, step, [] if packed is None else ours[batch], model, gpu)


def compiled_step(name: str, target: str, batch: int, form: Format | None, prefix: int) -> Step:
    """Counts the launches of a decode step. Call it in a process of `run_apart`."""
    program = compiled_decode(MODELS[name], GPUS[target], batch, form, prefix)
    kernels = [kernel for kernel in program.kernels if kernel.in_loop]
    others = [kernel for kernel in kernels if not kernel.name.startswith(OURS)]
    return Step(len(kernels), len(kernels) - len(others), sum(kernel.accessed_bytes for kernel in others))


def compiled_decode(model: Decoder, gpu: Gpu, batch: int, form: Format | None, prefix: int) -> Program:
    """Compiles the decode loop for a GPU. Call it in a process of `run_apart`."""
    params = jax.eval_shape(lambda: random_params(model, form))
    state = jax.eval_shape(lambda: start(model, params, batch, prefix, "gpu")[0])
    function = jax.jit(functools.partial(generation.decode, model, Policy()), donate_argnums=1)
    return compile_program(function, params, state, jax.ShapeDtypeStruct((), jnp.int32), gpu=gpu)


def _predicted(row: Row, step: Step, ours: Sequence[KernelReport], model: Decoder, gpu: Gpu) -> Row:
    """The row with times added; `ours` has the reports of this project's kernels in one block."""
    layers, config = model.config.num_layers, model.config
    dense = config.vocab_size * config.hidden_size
    if not ours:
        dense += layers * sum(out * columns for out, columns in fused_shapes(model).values())
    dense_bytes = jnp.dtype(model.dtype).itemsize * dense
    if step.ours != layers * len(ours) or step.other_bytes < dense_bytes + row.cache_bytes:
        raise SpqrError(
            f"the decode step launches {step.ours} kernels of this project, not {layers * len(ours)}, or its other "
            f"kernels access {step.other_bytes} bytes, fewer than the {dense_bytes + row.cache_bytes} of dense weights "
            "and cache"
        )
    packed = 1e-6 * layers * sum(kernel.predicted_us for kernel in ours)
    return row.with_times(
        step=packed + step.other_bytes / gpu.bandwidth + step.launches * GAP,
        products=packed + dense_bytes / gpu.bandwidth,
        attention=row.cache_bytes / gpu.bandwidth,
        launches=step.launches,
    )
