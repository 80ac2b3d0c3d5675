"""The predicted cost of a compiled kernel on its GPU: instructions, bytes and time, per weight and in total."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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

Setting = tuple[str, Format, int, tuple[int, int]]
"""One product: name of the GPU, format, tokens, (out, in)."""


@dataclass(frozen=True)
class KernelReport:
    """One kernel of a product, compiled for one GPU.

    Figures per weight exist only for the kernel that reads the codes and are None for other kernels. The main loop is
    the innermost loop that loads codes. Without such a loop it is all code outside loops.

    Attributes:
      kernel: name of the function on the GPU.
      format: of the matrix, as `Format` spells it.
      tokens: number of tokens.
      shape: (out, in).
      target: name of the GPU.
      registers: per thread.
      spill_bytes: bytes of registers that one thread spills to memory and reloads.
      shared_bytes: shared memory of one program.
      load_bytes: number of global loads in the main loop, by width in bytes.
      code_load_bytes: number of those that load codes, by width in bytes.
      code_reads: bytes of codes that all threads load / bytes of the codes. It is above 1 where tiles extend beyond
        the matrix, or where several programs treat the same rows.
      instructions_per_weight: threads · instructions of the main loop / weights.
      kinds: instructions per weight by kind.
      bytes_per_weight: bytes read / weights.
      issue_us: all instructions / the GPU's instruction rate. Without codes to read, each loop counts once.
      outlier_us: the part of `issue_us` in programs that treat only outliers.
      memory_us: bytes of all arrays read and written / the GPU's bandwidth.
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
    """Compiles the kernels that treat this number of tokens, and reports each.

    Args:
      target: one of `GPUS`.
      form: format of the packed matrix.
      tokens: number of rows of the activations, in bfloat16.
      shape: (out, in) of the matrix.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: the format does not support these sizes, or a kernel cannot be analyzed.

    Example:
      >>> report("h100", Format.parse("3b-g16-s3"), 1, (4096, 4096))[1].spill_bytes  # doctest: +SKIP
      0
    """
    return report_all([(target, form, tokens, shape)])[0]


def report_all(settings: Sequence[Setting], tiles: Sequence[Tile] | None = None) -> list[list[KernelReport]]:
    """Reports several products, compiled in parallel in separate processes.

    Args:
      settings: the products.
      tiles: one tile for each product. None: the tile that such a GPU uses.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: a format does not support these sizes, or a kernel cannot be analyzed.
    """
    reports = []
    for result in try_reports(settings, tiles):
        if isinstance(result, ValueError):
            raise result
        reports.append(result)
    return reports


def try_reports(
    settings: Sequence[Setting], tiles: Sequence[Tile] | None = None
) -> list[list[KernelReport] | ValueError]:
    """Reports several products like `report_all`, with an error in place of each report that fails.

    Args:
      settings: the products.
      tiles: one tile for each product. None: the tile that such a GPU uses.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: a format does not support these sizes.
    """
    for _, form, _, shape in settings:
        form.tensor(shape)  # Report unsupported sizes before anything is compiled.
    return list(run_apart(_try_report, settings, tiles or [None] * len(settings)))


def _try_report(setting: Setting, tile: Tile | None) -> list[KernelReport] | ValueError:
    try:
        return _report(setting, tile)
    except ValueError as error:  # Pallas raises plain ValueErrors for tiles that it cannot lower.
        return error


def _report(setting: Setting, tile: Tile | None) -> list[KernelReport]:
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
                    reports.append(_kernel_report(kernel, setting, w, launch))
                except SpqrError as error:
                    raise SpqrError(f"{kernel.name} for {target}, {form}, {tokens} tokens: {error}") from None
    return reports


@dataclass(frozen=True)
class _Parts:
    """Instructions of a kernel, by how often a thread executes them.

    Dense paths lead through a load of codes. Sparse paths do not: programs that treat only outliers take them.

    Attributes:
      main: the main loop.
      once: the rest of the dense paths.
      outlier: loops on sparse paths.
      sparse: the rest of the sparse paths.
      code_loads: all loads of codes, on any path.
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
    # Hoisted loads may form a loop of their own. The main loop has the most loads of codes.
    main = max(innermost, key=lambda body: len(body & code_loads), default=frozenset())
    outlier = frozenset().union(*(body for body in bodies if body <= sparse))
    once = program - sparse - main
    main, once = (main, once) if main else (once, main)
    return _Parts(main, once, outlier, sparse - outlier, code_loads)


def _kernel_report(kernel: Kernel, setting: Setting, w: SpqrTensor, launch: Launch) -> KernelReport:
    """The report of one kernel.

    Raises:
      SpqrError: the loops of the launch, or all loads of codes, are not found in the instructions.
    """
    target, form, tokens, shape = setting
    gpu, listing = GPUS[target], parse(kernel.sass)
    parts = _parts(listing, _code_loads(kernel, listing, w, gpu))
    weights = w.shape[0] * w.shape[1]
    steps, sparse_programs = (launch.steps, launch.sparse_programs) if parts.code_loads else (1, 0)
    threads = (kernel.programs - sparse_programs) * kernel.threads
    kinds = {kind: threads * steps * n / weights for kind, n in listing.kinds(parts.main).most_common()}
    dense = threads * (len(parts.once) + steps * len(parts.main))
    sparse = sparse_programs * kernel.threads * (len(parts.sparse) + launch.outlier_steps * len(parts.outlier))
    issue, outlier = (1e6 * instructions / gpu.instruction_rate for instructions in (dense + sparse, sparse))
    read, written = (sum(array.nbytes for array in arrays) for arrays in (kernel.reads, kernel.writes))
    memory = 1e6 * (read + written) / gpu.bandwidth
    return KernelReport(
        kernel=kernel.name,
        format=str(form),
        tokens=tokens,
        shape=shape,
        target=target,
        registers=kernel.registers,
        spill_bytes=kernel.spill_bytes,
        shared_bytes=kernel.shared_bytes,
        load_bytes=_widths(listing, parts.main),
        code_load_bytes=_widths(listing, parts.main & parts.code_loads),
        code_reads=_code_reads(listing, parts, w, launch, threads) if parts.code_loads else None,
        instructions_per_weight=sum(kinds.values()) if parts.code_loads else None,
        kinds=kinds if parts.code_loads else None,
        bytes_per_weight=read / weights if parts.code_loads else None,
        issue_us=issue,
        outlier_us=outlier,
        memory_us=memory,
        predicted_us=max(issue, memory),
    )


def _code_reads(listing: Listing, parts: _Parts, w: SpqrTensor, launch: Launch, threads: int) -> float:
    """Bytes of codes that these threads load / bytes of the codes.

    Raises:
      SpqrError: the loop over outliers, or some loads of codes, are not found.
    """
    if bool(parts.outlier) != bool(launch.outlier_steps):
        raise SpqrError(
            f"the launch has {launch.outlier_steps} steps over outliers, but {len(parts.outlier)} instructions were "
            "found in loops over outliers"
        )
    main, once = (_bytes(listing, part & parts.code_loads) for part in (parts.main, parts.once))
    code_reads = threads * (launch.steps * main + once) / ArrayType("u32", w.codes.shape).nbytes
    if code_reads < 1:
        raise SpqrError(f"the loads that were found read only {code_reads:.2f} of the codes, but must read all")
    return code_reads


def _code_loads(kernel: Kernel, listing: Listing, w: SpqrTensor, gpu: Gpu) -> frozenset[int]:
    """The instructions that load codes. Empty if the codes are no argument of the kernel.

    Raises:
      SpqrError: a load cannot be traced to one array.
    """
    codes = {i for i, array in enumerate(kernel.reads) if array == ArrayType("u32", w.codes.shape)}
    if not codes:
        return frozenset()
    loaded = loaded_parameters(listing, gpu.parameters)
    uncertain = sum(len(parameters) != 1 for parameters in loaded.values())
    if uncertain or not any(parameters <= codes for parameters in loaded.values()):
        raise SpqrError(f"{uncertain} of {len(loaded)} loads cannot be traced to one array, or none reads codes")
    return frozenset(number for number, parameters in loaded.items() if parameters <= codes)


def _widths(listing: Listing, numbers: Iterable[int]) -> dict[int, int]:
    """The number of loads among these instructions by width in bytes, widest first."""
    widths = (listing.instructions[number].load_bytes for number in numbers)
    counts = Counter(width for width in widths if width is not None)
    return dict(sorted(counts.items(), reverse=True))


def _bytes(listing: Listing, numbers: Iterable[int]) -> int:
    """Bytes that one thread loads with these instructions."""
    return sum(width * count for width, count in _widths(listing, numbers).items())
