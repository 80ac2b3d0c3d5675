"""Ahead-of-time compilation without a GPU: from a function to the machine instructions of its kernels."""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import TypeVar

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from pallas_kernels.aot.gpus import Gpu
from pallas_kernels.aot.hlo import ArrayType, accessed_bytes, parse_program

T = TypeVar("T")

PACKAGES = Path(sys.prefix, "aot")
"""Where `make aot-env` installs the compilers. If JAX found them on its usual path, it would search for a GPU in every
program and warn where there is none."""


@dataclass(frozen=True)
class Kernel:
    """One kernel launch of a compiled program.

    Attributes:
      name: name of the function on the GPU.
      programs: number of programs (thread blocks).
      threads: threads per program.
      shared_bytes: shared memory per program.
      registers: registers per thread.
      spill_bytes: bytes of registers that one thread spills to memory and reloads.
      reads: argument arrays, in the order of the kernel's parameters.
      writes: result arrays.
      accessed_bytes: bytes read and written, see `hlo.accessed_bytes`.
      in_loop: whether each step of a loop launches the kernel.
      cubin: machine code, in a file that may hold other kernels too.
    """

    name: str
    programs: int
    threads: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    reads: tuple[ArrayType, ...]
    writes: tuple[ArrayType, ...]
    accessed_bytes: int
    in_loop: bool
    cubin: bytes = field(repr=False)

    @cached_property
    def sass(self) -> str:
        """Machine instructions (SASS), as `nvdisasm -c` lists them. Disassembling takes longer than compiling."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            listing = _output(_tool("nvdisasm"), "-c", file.name)
        sections = re.split(r"^\s*\.section\s+\.text\.([\w$.]+),.*$", listing, flags=re.MULTILINE)
        return dict(zip(sections[1::2], sections[2::2], strict=True))[self.name]


@dataclass(frozen=True)
class Program:
    """A compiled program: its kernels in the order of their launches, and its text in XLA's form (HLO)."""

    kernels: tuple[Kernel, ...]
    hlo: str


def compile_program(function: jax.stages.Wrapped, *args: PyTree, gpu: Gpu) -> Program:
    """Compiles a jitted function for arguments of the given types.

    Call it in a process of `run_apart`, where JAX finds `PACKAGES` and does not search for a GPU. During tracing the
    target GPU is JAX's default device, so `spqr_matmul` selects its kernels.

    Args:
      function: a jitted function.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      gpu: the target.

    Raises:
      ModuleNotFoundError: the compiler is not installed.

    Example:
      >>> number = jax.ShapeDtypeStruct((8,), jnp.float32)
      >>> compile_program(jax.jit(jnp.tanh), number, gpu=GPUS["h100"]).kernels[0].registers  # doctest: +SKIP
      10
    """
    check_installed()
    topology = topologies.get_topology_desc(platform="cuda", target_config=gpu.text(), topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda arg: jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=sharding), args)
    with tempfile.TemporaryDirectory() as directory:
        # Without a filter JAX 0.11 dumps every compiler pass, 50 MB for one kernel.
        options: dict[str, str | bool] = {"xla_dump_to": directory, "xla_dump_emitter_re": "ptx"}
        # As a GPU runs it, whatever XLA_FLAGS says for this machine.
        options["xla_backend_optimization_level"] = "3"
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(topology.devices[0]):
            compiled = function.lower(*args).compile(compiler_options=options)
        hlo = compiled.as_text() or ""
        return Program(tuple(_launches(Path(directory), hlo)), hlo)


def run_apart(function: Callable[..., T], *columns: Sequence[object]) -> Iterator[T]:
    """Computes `map(function, *columns)` in parallel, in processes that can compile for GPUs.

    Args:
      function: defined at the top of a module, so that it can be pickled.
      columns: the arguments, one sequence per parameter.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
    """
    check_installed()
    workers = min(len(columns[0]), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_configure_worker) as pool:
        yield from pool.map(function, *columns)


def _configure_worker() -> None:
    sys.path.append(str(PACKAGES))
    # Otherwise JAX would use the plugin to search for a GPU, and warn where there is none.
    jax.config.update("jax_platforms", "cpu")
    # JAX's cache can store programs for absent devices but cannot load them, and cached programs are not dumped.
    jax.config.update("jax_enable_compilation_cache", False)


def check_installed() -> None:
    """Raises a ModuleNotFoundError if a package of the compiler is missing or is for another version of JAX."""
    advice = "to compile ahead for a GPU, run `make aot-env` first"
    try:
        plugin = _plugin_version()
        _tool("ptxas"), _tool("nvdisasm")
    except FileNotFoundError as error:
        raise ModuleNotFoundError(f"{advice}: {error} is not installed") from None
    if plugin != jax.__version__:
        raise ModuleNotFoundError(f"{advice}: jax-cuda13-plugin is {plugin}, but jax is {jax.__version__}")


def _plugin_version() -> str:
    name = "jax-cuda13-plugin"
    for distribution in distributions(name=name, path=[*sys.path, str(PACKAGES)]):
        return distribution.version
    raise FileNotFoundError(name)


def _launches(dump: Path, hlo: str) -> Iterator[Kernel]:
    """The kernels of a program, from the directory that its compilation was dumped to."""
    machine_code = _assemble(dump)
    (sequence,), (metadata,) = dump.glob("*.thunk_sequence.txt"), dump.glob("*.thunk_metadata.txt")
    instructions = re.findall(r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)', metadata.read_text())
    by_thunk = {int(thunk): name for name, thunk in instructions}
    program = parse_program(hlo)
    sizes = r"\[(\d+), (\d+), (\d+)\]"
    launch = re.compile(
        rf"^( *)(\d+): \w+ .*?(\S+) grid: {sizes} threads: {sizes} +shared_memory: (\d+) bytes", re.MULTILINE
    )
    for indent, thunk, name, *numbers in launch.findall(sequence.read_text()):
        x, y, z, threads_x, threads_y, threads_z, shared = map(int, numbers)
        instruction = by_thunk[int(thunk)]
        registers, spill_bytes, cubin = machine_code[name]
        yield Kernel(
            name=name,
            programs=x * y * z,
            threads=threads_x * threads_y * threads_z,
            shared_bytes=shared,
            registers=registers,
            spill_bytes=spill_bytes,
            reads=tuple(array for operand in program[instruction].operands for array in program[operand].types),
            writes=program[instruction].types,
            accessed_bytes=accessed_bytes(program, instruction),
            in_loop=bool(indent),
            cubin=cubin,
        )


def _assemble(dump: Path) -> dict[str, tuple[int, int, bytes]]:
    """Registers, spilled bytes and machine code of each kernel whose PTX is in a directory, by name."""
    # One file per call: ptxas 13.5 sometimes crashes when it is given many.
    files = [path for path in sorted(dump.glob("*.ptx")) if ".entry" in path.read_text()]
    return {name: kernel for path in files for name, kernel in _assemble_file(path).items()}


def _assemble_file(ptx: Path) -> dict[str, tuple[int, int, bytes]]:
    (architecture,) = re.findall(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    cubin = ptx.with_suffix(".cubin")
    log = _output(_tool("ptxas"), f"-arch={architecture}", "-v", ptx, "-o", cubin)
    properties = re.findall(
        r"Compiling entry function '(.+?)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return {name: (int(used), int(stores) + int(loads), cubin.read_bytes()) for name, stores, loads, used in properties}


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _tool(name: str) -> Path:
    """Path of a program in one of NVIDIA's packages. JAX ships its own copies elsewhere."""
    for folder in (*map(Path, sys.path), PACKAGES):
        for path in sorted(folder.glob(f"nvidia/*/bin/{name}")):
            return path
    raise FileNotFoundError(name)
