"""Compiling for a GPU that is not there: from a function to the machine instructions of its kernels."""

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.aot.gpus import Gpu

PACKAGES = Path(sys.prefix, "aot")
"""Where `make aot-env` installs what only this compiler needs; other programs, which do not look there, would have JAX
look for a GPU, and complain where there is none."""


@dataclass(frozen=True)
class ArrayType:
    """Type of one array in XLA's words, such as u32 and (3, 4096, 128)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of such an array."""
        width = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(width[0]) // 8 if width else 1)


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
    sass: str


def compile_kernels(function: Callable[..., Any], *args: Any, gpu: Gpu) -> list[Kernel]:
    """The kernels of a function for arguments of these types, in the order in which they are launched.

    For processes of `report_all`, in which JAX finds `PACKAGES` and looks for no GPU.

    Raises:
      ModuleNotFoundError: the compiler is not installed.

    Example:
      >>> compile_kernels(jnp.tanh, jax.ShapeDtypeStruct((8,), jnp.float32), gpu=GPUS["h100"])[0].registers
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
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = jax.jit(function).lower(*args).compile(compiler_options=options)
        return list(_launches(Path(directory), compiled.as_text() or ""))


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
    sizes = r"\[(\d+), (\d+), (\d+)\]"
    launch = re.compile(rf"(\d+): \w+ .*?(\S+) grid: {sizes} threads: {sizes} +shared_memory: (\d+) bytes")
    for thunk, name, *numbers in launch.findall(sequence.read_text()):
        x, y, z, threads_x, threads_y, threads_z, shared = map(int, numbers)
        reads, writes = _array_types(hlo, by_thunk[int(thunk)])
        registers, spill_bytes, sass = machine_code[name]
        yield Kernel(
            name=name,
            programs=x * y * z,
            threads=threads_x * threads_y * threads_z,
            shared_bytes=shared,
            registers=registers,
            spill_bytes=spill_bytes,
            reads=reads,
            writes=writes,
            sass=sass,
        )


def _array_types(hlo: str, instruction: str) -> tuple[tuple[ArrayType, ...], tuple[ArrayType, ...]]:
    """Types of the operands and of the results of one instruction of a program."""

    def definition(name: str) -> tuple[str, str]:
        match = re.search(rf"^\s*(?:ROOT )?%{re.escape(name)} = (.+?) [\w-]+\((.*?)\)", hlo, re.MULTILINE)
        assert match is not None
        return match[1], match[2]

    def types(text: str) -> tuple[ArrayType, ...]:
        found = re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]", text)
        return tuple(ArrayType(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found)

    result, operands = definition(instruction)
    reads = [types(definition(name)[0]) for name in re.findall(r"%([\w.-]+)", operands)]
    return tuple(array for operand in reads for array in operand), types(result)


def _assemble(dump: Path) -> dict[str, tuple[int, int, str]]:
    """Registers, bytes spilled and instructions of each kernel whose PTX is in a directory, by name."""
    files = {path: text for path in dump.glob("*.ptx") if ".entry" in (text := path.read_text())}
    architectures = {target for text in files.values() for target in re.findall(r"^\.target (\w+)", text, re.MULTILINE)}
    (architecture,), cubin = architectures, dump / "kernels.cubin"
    log = _output(_tool("ptxas"), f"-arch={architecture}", "-v", *files, "-o", cubin)
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
