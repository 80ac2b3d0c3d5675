"""A parser of compiled programs in XLA's text form (HLO), and the bytes that each instruction reads and writes."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*?)\)(?:.*?calls=%([\w.-]+))?")
_PARTS = "dynamic-slice", "gather"


@dataclass(frozen=True)
class ArrayType:
    """Type of one array in XLA's notation, such as u32 and (3, 4096, 128)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of an array of this type in bytes."""
        width = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(width[0]) // 8 if width else 1)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a program.

    Attributes:
      computation: name of the computation that contains it.
      root: whether its result is the result of the computation.
      types: types of its results.
      opcode: name of the operation.
      operands: names of the instructions that compute its operands. For a parameter: its number.
      calls: name of the computation that a fusion runs.
    """

    computation: str
    root: bool
    types: tuple[ArrayType, ...]
    opcode: str
    operands: tuple[str, ...]
    calls: str | None

    @property
    def nbytes(self) -> int:
        """Size of the results in bytes."""
        return sum(array.nbytes for array in self.types)


Instructions = Mapping[str, Instruction]


def parse_program(text: str) -> dict[str, Instruction]:
    """The instructions of a program by name.

    Example:
      >>> program = parse_program("  ROOT %sum = f32[8]{0} add(%a, %b)")
      >>> program["sum"].opcode, program["sum"].operands, program["sum"].nbytes
      ('add', ('a', 'b'), 32)
    """
    program = {}
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            root, name, types, opcode, operands, calls = match.groups()
            names = (operands,) if opcode == "parameter" else tuple(re.findall(r"%([\w.-]+)", operands))
            program[name] = Instruction(computation, bool(root), _types(types), opcode, names, calls)
    return program


def accessed_bytes(program: Instructions, name: str) -> int:
    """Bytes that an instruction reads and writes.

    Arrays that a fusion slices, gathers from or updates in place count only with the part that is accessed.

    Example:
      >>> text = "%a = f32[8]{0} parameter(0)"
      >>> accessed_bytes(parse_program(text + chr(10) + "ROOT %sum = f32[8]{0} add(%a, %a)"), "sum")
      96
    """
    instruction = program[name]
    operands = [program[operand].nbytes for operand in instruction.operands]
    if instruction.calls is None:
        return sum(operands) + instruction.nbytes
    inside = {key: one for key, one in program.items() if one.computation == instruction.calls}
    parameters = {int(one.operands[0]): key for key, one in inside.items() if one.opcode == "parameter"}
    read = sum(min(size, _read(inside, parameters[i])) for i, size in enumerate(operands))
    (root,) = (key for key, one in inside.items() if one.root)
    return read + _written(inside, root)


def _types(text: str) -> tuple[ArrayType, ...]:
    found = re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]", text)
    return tuple(ArrayType(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found)


def _read(inside: Instructions, name: str) -> int:
    """Bytes of an array that its users in a computation read, including users of its in-place updates."""
    total = 0
    for key, user in _users(inside, name):
        first = user.operands[0] == name
        if user.opcode == "bitcast" or (user.opcode == "dynamic-update-slice" and first):
            total += _read(inside, key)
        elif user.opcode in _PARTS and first:
            total += user.nbytes
        elif user.opcode != "tuple":
            total += inside[name].nbytes
    return total


def _written(inside: Instructions, name: str) -> int:
    instruction = inside[name]
    if instruction.opcode == "tuple":
        return sum(_written(inside, operand) for operand in instruction.operands)
    if instruction.opcode == "bitcast":
        return _written(inside, instruction.operands[0])
    if instruction.opcode == "dynamic-update-slice":
        return inside[instruction.operands[1]].nbytes
    return instruction.nbytes


def _users(inside: Instructions, name: str) -> Iterator[tuple[str, Instruction]]:
    return ((key, one) for key, one in inside.items() if name in one.operands and one.opcode != "parameter")
