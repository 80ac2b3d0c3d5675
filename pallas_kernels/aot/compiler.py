"""Compiling for a GPU that is not there: from a function to the machine instructions of its kernels."""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.aot.gpus import Gpu
from pallas_kernels.aot.hlo import ArrayType, accessed_bytes, parse_program

T = TypeVar("T")

PACKAGES = Path(sys.prefix, "aot")
"""Where `make aot-env` installs what only this compiler needs; other programs, which do not look there, would have JAX
look for a GPU, and complain where there is none."""


@dataclass(frozen=True)
class Kernel:
    """One kernel launch of a compiled program.

    Attributes:
      name: of the function on the GPU.
      programs: number of programs (thread blocks).
      threads: threads of one program.
      shared_bytes: shared memory of one program.
      registers: of one thread.
      spill_bytes: bytes of registers that one thread stores in memory and loads again, for want of registers.
      reads: arrays that it is given, in the order of its parameters.
      writes: arrays that it returns.
      accessed_bytes: bytes that it reads and writes, see `hlo.accessed_bytes`.
      in_loop: whether it is launched in each step of a loop.
      sass: its instructions, as `nvdisasm -c` lists them.
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
    sass: str


@dataclass(frozen=True)
class Program:
    """A compiled program: its kernels, in the order in which they are launched, and its text in XLA's form."""

    kernels: tuple[Kernel, ...]
    hlo: str


def compile_program(function: Any, *args: Any, gpu: Gpu) -> Program:
    """Compiles a function for arguments of these types.

    For processes of `run_apart`, in which JAX finds `PACKAGES` and looks for no GPU. While it is traced, the GPU is the
    device that JAX computes on: `spqr_matmul` takes the kernels.

    Args:
      function: a jitted function.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      gpu: to compile for.

    Raises:
      ModuleNotFoundError: the compiler is not installed.

    Example:
      >>> number = jax.ShapeDtypeStruct((8,), jnp.float32)
      >>> compile_program(jax.jit(jnp.tanh), number, gpu=GPUS["h100"]).kernels[0].registers
      10
    """
    check_installed()
    topology = topologies.get_topology_desc(platform="cuda", target_config=gpu.text(), topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda arg: jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=sharding), args)
    with tempfile.TemporaryDirectory() as directory:
        # The expression keeps JAX 0.11 from writing out every step of the compiler, 50 MB for one kernel.
        options: dict[str, str | bool] = {"xla_dump_to": directory, "xla_dump_emitter_re": "ptx"}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(topology.devices[0]):
            compiled = function.lower(*args).compile(compiler_options=options)
        hlo = compiled.as_text() or ""
        return Program(tuple(_launches(Path(directory), hlo)), hlo)


def run_apart(function: Callable[..., T], *columns: Sequence[Any]) -> Iterator[T]:
    """`map(function, *columns)` in processes that can compile for GPUs, side by side.

    Args:
      function: of a module, so that it can be sent to a process.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
    """
    check_installed()
    workers = min(len(columns[0]), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_configure_worker) as pool:
        yield from pool.map(function, *columns)


def _configure_worker() -> None:
    sys.path.append(str(PACKAGES))
    # With the plugin for GPUs found, JAX would look for one, and complain where there is none.
    jax.config.update("jax_platforms", "cpu")
    # Such programs are written to JAX's cache but cannot be read from it, and what comes from there is not dumped.
    jax.config.update("jax_enable_compilation_cache", False)


def check_installed() -> None:
    """Raises a ModuleNotFoundError where a package that only this compiler needs is missing, or is for another JAX."""
    advice = "to compile for a GPU that is not there, run `make aot-env` first"
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
    """The kernels of a program from what its compilation has left in a directory."""
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
        registers, spill_bytes, sass = machine_code[name]
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
            sass=sass,
        )


def _assemble(dump: Path) -> dict[str, tuple[int, int, str]]:
    """Registers, bytes spilled and instructions of each kernel whose PTX is in a directory, by name."""
    # One file at a time: given many, ptxas 13.5 crashes now and then.
    files = [path for path in sorted(dump.glob("*.ptx")) if ".entry" in path.read_text()]
    return {name: kernel for path in files for name, kernel in _assemble_file(path).items()}


def _assemble_file(ptx: Path) -> dict[str, tuple[int, int, str]]:
    (architecture,) = re.findall(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    cubin = ptx.with_suffix(".cubin")
    log = _output(_tool("ptxas"), f"-arch={architecture}", "-v", ptx, "-o", cubin)
    listing = _output(_tool("nvdisasm"), "-c", cubin)
    sections = re.split(r"^\s*\.section\s+\.text\.([\w$.]+),.*$", listing, flags=re.MULTILINE)
    sass = dict(zip(sections[1::2], sections[2::2], strict=True))
    properties = re.findall(
        r"Compiling entry function '(.+?)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return {name: (int(used), int(stores) + int(loads), sass[name]) for name, stores, loads, used in properties}


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _tool(name: str) -> Path:
    """A program in one of NVIDIA's packages, of which JAX takes its own copies."""
    for folder in (*map(Path, sys.path), PACKAGES):
        for path in sorted(folder.glob(f"nvidia/*/bin/{name}")):
            return path
    raise FileNotFoundError(name)
