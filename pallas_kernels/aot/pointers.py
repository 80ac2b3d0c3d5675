"""Which array each load of a kernel reads, found by following the kernel's parameters to the loads' addresses."""

import re

from pallas_kernels.aot.sass import Listing

_REGISTER = re.compile(r"\bU?R\d+\b")


def loaded_parameters(listing: Listing, parameters: int) -> dict[int, frozenset[int]]:
    """For each load from global memory, the numbers of the parameters that its address is made of, in general one.

    Every parameter is a pointer of 8 bytes, from the offset `parameters` of the constant bank on. A register holds a
    pointer's parameter until it is written again; what is loaded through a pointer is none.

    Example:
      >>> listing = parse("/*0000*/ LDC.64 R2, c[0x0][0x218] ;\\n/*0010*/ LDG.E.128 R4, [R2.64] ;")
      >>> loaded_parameters(listing, 0x210)
      {1: frozenset({1})}
    """
    held: dict[str, frozenset[int]] = {}
    loads = {}
    for number, instruction in enumerate(listing.instructions):
        target, _, sources = instruction.operands.partition(",")
        if instruction.load_bytes is not None:
            address = instruction.operands.rpartition("[")[2]
            loads[number] = _union(held, address)
        if not _REGISTER.fullmatch(target):
            continue
        is_load = instruction.name.split(".")[0] in ("LDG", "LDS", "LDSM", "LDL")
        for i in range(_registers(instruction.name)):
            value: frozenset[int] = frozenset()
            if not is_load:
                value = _union(held, sources) | _constants(sources, parameters, 4 * i)
            bank, first = re.fullmatch(r"(U?R)(\d+)", target).groups()  # type: ignore[union-attr]
            register = f"{bank}{int(first) + i}"
            held[register] = value | (held.get(register, frozenset()) if instruction.guarded else frozenset())
    return loads


def _registers(name: str) -> int:
    """Number of registers that an instruction of this name writes."""
    parts = name.split(".")
    return 4 if "128" in parts else 2 if "64" in parts or "WIDE" in parts else 1


def _union(held: dict[str, frozenset[int]], text: str) -> frozenset[int]:
    return frozenset().union(*(held.get(register, frozenset()) for register in _REGISTER.findall(text)))


def _constants(text: str, parameters: int, beyond: int) -> frozenset[int]:
    offsets = (int(offset, 16) + beyond - parameters for offset in re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text))
    return frozenset(offset // 8 for offset in offsets if offset >= 0)
