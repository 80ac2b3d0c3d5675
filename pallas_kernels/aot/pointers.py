"""Traces each load of a kernel to the array that it reads, by data flow from the kernel's parameters to addresses."""

import re

from pallas_kernels.aot.sass import Instruction, Listing

Held = dict[str, frozenset[int]]
"""The parameters that the content of each register, and of each word of the stack, is computed from."""

_REGISTER = re.compile(r"\bU?R\d+\b")
_RESULT = re.compile(r"(?:P[T\d], )?(U?R)(\d+),")
"""The first register that an instruction writes, after an optional predicate."""
_STACK = re.compile(r"\[R1(?:\+(0x[0-9a-f]+))?\](?:, R(\d+))?")
"""The stack address of a register spill, and the first spilled register."""


def loaded_parameters(listing: Listing, parameters: int) -> dict[int, frozenset[int]]:
    """The numbers of the parameters that the address of each global load may be computed from.

    A forward data-flow analysis with these rules:

    * Parameters are pointers of 8 bytes, stored in the constant bank from the offset `parameters` on.
    * A register carries a parameter until it is overwritten. Loaded values carry none.
    * Where paths of the program join, a register carries the union over the paths.
    * A predicate that guards a write is assumed to guard the uses too.

    Returns:
      the parameters of each global load, by the number of the instruction.

    Example:
      >>> from pallas_kernels.aot.sass import parse
      >>> listing = parse("/*0000*/ LDC.64 R2, c[0x0][0x218] ;\\n/*0010*/ LDG.E.128 R4, [R2.64] ;")
      >>> loaded_parameters(listing, 0x210)
      {1: frozenset({1})}
    """
    loads: dict[int, frozenset[int]] = {}
    entering: dict[int, Held] = {0: {}}
    changed = [0]
    while changed:
        number = changed.pop()
        instruction, held = listing.instructions[number], entering[number]
        if instruction.load_bytes is not None:
            loads[number] = _union(held, instruction.operands.rpartition("[")[2])
        held = held | _written(instruction, held, parameters)
        for successor in listing.successors[number]:
            known = entering.get(successor)
            merged = held if known is None else _merged(known, held)
            if merged != known:
                entering[successor] = merged
                changed.append(successor)
    return loads


def _written(instruction: Instruction, held: Held, parameters: int) -> Held:
    """The parameters carried by each register or stack word that an instruction writes."""
    kind, count = instruction.name.split(".")[0], _registers(instruction.name)
    stack = _STACK.search(instruction.operands) if kind in ("STL", "LDL") else None
    words = [f"stack {int(stack[1] or '0', 16) + 4 * i}" for i in range(count)] if stack else []
    if kind == "STL":
        # RZ is the constant zero, so a spill of it carries no pointer.
        kept = int(stack[2]) if stack and stack[2] else -len(words)
        return {word: held.get(f"R{kept + i}", frozenset()) for i, word in enumerate(words)}
    result = _RESULT.match(instruction.operands)
    if result is None:
        return {}
    sources = instruction.operands[result.end() :]
    written = {}
    for i in range(count):
        value: frozenset[int] = frozenset()
        if words:
            value = held.get(words[i], value)
        elif kind not in ("LDG", "LDS", "LDSM", "LDL"):
            value = _union(held, sources) | _constants(sources, parameters, 4 * i)
        written[f"{result[1]}{int(result[2]) + i}"] = value
    return written


def _registers(name: str) -> int:
    """The number of registers that an instruction with this name writes."""
    parts = name.split(".")
    if "128" in parts or "4" in parts or parts[0] in ("HMMA", "IMMA"):
        return 4
    return 2 if "64" in parts or "WIDE" in parts or (parts[0] == "CS2R" and "32" not in parts) else 1


def _union(held: Held, text: str) -> frozenset[int]:
    return frozenset().union(*(held.get(register, frozenset()) for register in _REGISTER.findall(text)))


def _merged(first: Held, second: Held) -> Held:
    missing: frozenset[int] = frozenset()
    return {name: first.get(name, missing) | second.get(name, missing) for name in first | second}


def _constants(text: str, parameters: int, beyond: int) -> frozenset[int]:
    offsets = (int(offset, 16) + beyond - parameters for offset in re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text))
    return frozenset(offset // 8 for offset in offsets if offset >= 0)
