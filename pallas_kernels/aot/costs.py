"""What a compiled kernel will cost on its GPU: instructions, bytes and time, per weight and in all."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot.compiler import Kernel, compile_program, run_apart
from pallas_kernels.aot.formats import Format
from pallas_kernels.aot.gpus import GPUS, Gpu
from pallas_kernels.aot.hlo import ArrayType
from pallas_kernels.aot.kernels import COMPILED
from pallas_kernels.aot.pointers import loaded_parameters
from pallas_kernels.aot.sass import Listing, loops, parse, reachable, through
from pallas_kernels.backends.triton.launch import Launch
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.measurements import best_tile
from pallas_kernels.tuning.tiles import Tile


@dataclass(frozen=True)
class KernelReport:
    """One kernel of a product, compiled for one GPU.

    The figures per weight are those of the kernel that reads the codes, and None for what runs beside it. The main
    loop is the innermost loop that loads codes; where none does, everything outside loops.

    Attributes:
      kernel: name of the function on the GPU.
      format: of the matrix, as `Format` spells it.
      tokens: number of tokens.
      shape: (out, in).
      target: name of the GPU.
      registers: of one thread.
      spill_bytes: stored and loaded again by one thread for want of registers.
      shared_bytes: shared memory of one program.
      load_bytes: how many loads from global memory, of the main loop, have each width in bytes.
      code_load_bytes: the same of the loads of codes alone.
      code_reads: bytes that all threads load with these over those of the codes; more than 1 where tiles reach beyond
        the matrix, or several programs treat the same rows.
      instructions_per_weight: of the main loop, threads times instructions over weights.
      kinds: the same by kind of instruction.
      bytes_per_weight: read, over weights.
      issue_us: all instructions over the GPU's instruction rate; of a kernel that reads no codes, loops count once.
      outlier_us: the part of it that the programs have which treat outliers, and no codes.
      memory_us: bytes of all arrays read and written over the GPU's bandwidth.
      predicted_us: the larger of `issue_us` and `memory_us`.
    """

    kernel: str
    format: str
    tokens: int
    shape: tuple[int, int]
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bytes: dict[int, int]
    code_load_bytes: dict[int, int]
    code_reads: float | None
    instructions_per_weight: float | None
    kinds: dict[str, float] | None
    bytes_per_weight: float | None
    issue_us: float
    outlier_us: float
    memory_us: float
    predicted_us: float


def report(target: str, form: Format, tokens: int, shape: tuple[int, int]) -> list[KernelReport]:
    """Compiles all that treats so many tokens, and reports each kernel.

    Args:
      target: one of `GPUS`.
      form: what the matrix is packed as.
      tokens: number of rows of the activations, in bfloat16.
      shape: (out, in) of the matrix.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: the format does not support these sizes, or a kernel's instructions are not understood.

    Example:
      >>> report("h100", Format.parse("3b-g16-s3"), 1, (4096, 4096))[1].spill_bytes
      0
    """
    return report_all([(target, form, tokens, shape)])[0]


def report_all(
    settings: Sequence[tuple[str, Format, int, tuple[int, int]]], tiles: Sequence[Tile] | None = None
) -> list[list[KernelReport]]:
    """`report` of several settings, compiled side by side in processes of their own.

    Args:
      settings: target, format, tokens and shape of each.
      tiles: the tile for each; without, that which is used on such a GPU.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: a format does not support these sizes, or a kernel's instructions are not understood.
    """
    reports = []
    for result in try_reports(settings, tiles):
        if isinstance(result, ValueError):
            raise result
        reports.append(result)
    return reports


def try_reports(
    settings: Sequence[tuple[str, Format, int, tuple[int, int]]], tiles: Sequence[Tile] | None = None
) -> list[list[KernelReport] | ValueError]:
    """The same, with an error in the place of a report whose kernel's instructions are not understood."""
    for _, form, _, shape in settings:
        form.tensor(shape)  # What does not fit is told before anything is compiled.
    return list(run_apart(_try_report, settings, tiles or [None] * len(settings)))


def _try_report(
    setting: tuple[str, Format, int, tuple[int, int]], tile: Tile | None
) -> list[KernelReport] | ValueError:
    try:
        return _report(setting, tile)
    except ValueError as error:  # Pallas raises plain ones for tiles that it cannot lower
        return error


def _report(setting: tuple[str, Format, int, tuple[int, int]], tile: Tile | None) -> list[KernelReport]:
    target, form, tokens, shape = setting
    w = form.tensor(shape)
    x = jax.ShapeDtypeStruct((tokens, shape[1]), jnp.bfloat16)
    reports = []
    for compiled in COMPILED:
        if tokens in compiled.tokens:
            used = tile or best_tile(compiled.regime, w, tokens, target)
            function = jax.jit(functools.partial(compiled.function, tile=used, interpret=False))
            launch = compiled.launch(w, tokens, used)
            for kernel in compile_program(function, x, w, gpu=GPUS[target]).kernels:
                try:
                    costs = _costs(kernel, w, launch, GPUS[target])
                except SpqrError as error:
                    raise SpqrError(f"{kernel.name} for {target}, {form}, {tokens} tokens: {error}") from None
                reports.append(
                    KernelReport(kernel.name, format=str(form), tokens=tokens, shape=shape, target=target, **costs)
                )
    return reports


@dataclass(frozen=True)
class _Parts:
    """Instructions of a kernel, by how often each thread of its programs executes them.

    Attributes:
      main: those of the main loop.
      once: the others on the ways that lead through loads of codes.
      outlier: those of the loops on the other ways, which programs that treat outliers take.
      sparse: the others there.
      code_loads: all that load codes, wherever they are.
    """

    main: frozenset[int]
    once: frozenset[int]
    outlier: frozenset[int]
    sparse: frozenset[int]
    code_loads: frozenset[int]


def _parts(listing: Listing, code_loads: frozenset[int]) -> _Parts:
    program = frozenset(reachable(listing))
    if not code_loads:
        return _Parts(program, frozenset(), frozenset(), frozenset(), code_loads)
    sparse = program - through(listing, code_loads)
    bodies = loops(listing)
    loading = [body for body in bodies if body & code_loads]
    innermost = [body for body in loading if not any(inside < body for inside in loading)]
    # Loads moved ahead of a loop may make a loop of their own: the main one has the most.
    main = max(innermost, key=lambda body: len(body & code_loads), default=frozenset())
    outlier = frozenset().union(*(body for body in bodies if body <= sparse))
    once = program - sparse - main
    main, once = (main, once) if main else (once, main)
    return _Parts(main, once, outlier, sparse - outlier, code_loads)


def _costs(kernel: Kernel, w: SpqrTensor, launch: Launch, gpu: Gpu) -> dict[str, Any]:
    """The fields of `KernelReport` that tell what one kernel costs.

    Raises:
      SpqrError: the loops that a launch tells of are not found, or not all loads of codes.
    """
    listing = parse(kernel.sass)
    parts = _parts(listing, _code_loads(kernel, listing, w, gpu))
    weights = w.shape[0] * w.shape[1]
    steps, sparse_programs = (launch.steps, launch.sparse_programs) if parts.code_loads else (1, 0)
    threads = (kernel.programs - sparse_programs) * kernel.threads
    kinds = {kind: threads * steps * n / weights for kind, n in listing.kinds(parts.main).most_common()}
    code_reads = None
    if parts.code_loads:
        if bool(parts.outlier) != bool(launch.outlier_steps):
            raise SpqrError(
                f"{launch.outlier_steps} steps over outliers, in a loop of {len(parts.outlier)} instructions"
            )
        code_bytes = steps * _bytes(listing, parts.main & parts.code_loads) + _bytes(
            listing, parts.once & parts.code_loads
        )
        code_reads = threads * code_bytes / ArrayType("u32", w.codes.shape).nbytes
        if code_reads < 1:
            raise SpqrError(f"only {code_reads:.2f} of the codes seem to be loaded")
    dense = threads * (len(parts.once) + steps * len(parts.main))
    sparse = sparse_programs * kernel.threads * (len(parts.sparse) + launch.outlier_steps * len(parts.outlier))
    issue, outlier = (1e6 * instructions / gpu.instruction_rate for instructions in (dense + sparse, sparse))
    read, written = (sum(array.nbytes for array in arrays) for arrays in (kernel.reads, kernel.writes))
    memory = 1e6 * (read + written) / gpu.bandwidth
    return {
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "load_bytes": _widths(listing, parts.main),
        "code_load_bytes": _widths(listing, parts.main & parts.code_loads),
        "code_reads": code_reads,
        "instructions_per_weight": sum(kinds.values()) if parts.code_loads else None,
        "kinds": kinds if parts.code_loads else None,
        "bytes_per_weight": read / weights if parts.code_loads else None,
        "issue_us": issue,
        "outlier_us": outlier,
        "memory_us": memory,
        "predicted_us": max(issue, memory),
    }


def _code_loads(kernel: Kernel, listing: Listing, w: SpqrTensor, gpu: Gpu) -> frozenset[int]:
    """The instructions that load codes; none where the kernel is not given them.

    Raises:
      SpqrError: what some load reads is not certain.
    """
    codes = {i for i, array in enumerate(kernel.reads) if array == ArrayType("u32", w.codes.shape)}
    if not codes:
        return frozenset()
    loaded = loaded_parameters(listing, gpu.parameters)
    uncertain = sum(len(parameters) != 1 for parameters in loaded.values())
    if uncertain or not any(parameters <= codes for parameters in loaded.values()):
        raise SpqrError(f"{uncertain} of {len(loaded)} loads cannot be traced to one array, or none to the codes")
    return frozenset(number for number, parameters in loaded.items() if parameters <= codes)


def _widths(listing: Listing, numbers: Iterable[int]) -> dict[int, int]:
    """How many of these instructions load so many bytes, widest first."""
    widths = (listing.instructions[number].load_bytes for number in numbers)
    counts = Counter(width for width in widths if width is not None)
    return dict(sorted(counts.items(), reverse=True))


def _bytes(listing: Listing, numbers: Iterable[int]) -> int:
    """Bytes that a thread loads with these instructions."""
    return sum(width * count for width, count in _widths(listing, numbers).items())
