"""A parser of machine instructions (SASS): control flow, loops, and the kind of each instruction."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pallas_kernels.errors import SpqrError

KINDS = {
    "load global": ("LDG", "LDGSTS"),
    "store global": ("STG", "RED", "ATOM"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM"),
    "tensor core": ("HMMA", "HGMMA", "IMMA", "IGMMA"),
    "fma": ("FFMA", "HFMA2"),
    "add": ("FADD", "FMUL", "HADD2", "HMUL2", "FMNMX"),
    "convert": ("F2F", "F2FP", "F2I", "I2F", "I2FP", "I2I", "HADD2.F32"),
    "logic": ("LOP3", "PLOP3", "ULOP3", "PRMT", "SEL", "FSEL", "USEL"),
    "shift": ("SHF", "USHF", "IMAD.SHL", "IMAD.U32"),
    "move": ("MOV", "UMOV", "IMAD.MOV", "CS2R", "S2R", "S2UR", "LDC", "ULDC", "R2UR", "SHFL"),
    "integer": ("IMAD", "UIMAD", "IADD3", "UIADD3", "LEA", "ULEA", "VIADD", "ISETP", "UISETP", "IMNMX", "VIMNMX"),
    "synchronize": ("BAR", "BSSY", "BSYNC", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "FENCE", "MEMBAR"),
    "control": ("BRA", "CALL", "EXIT", "ACQBULK", "NOP"),
}
"""Kinds of instructions by the first parts of their names. The longest match decides."""

_KIND = {name: kind for kind, names in KINDS.items() for name in names}
_LINE = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;|(\.L\w+):)", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One line of a listing, such as `@!P0 LDG.E.128 R8, [R2.64+0x10]`.

    Attributes:
      name: name with modifiers, such as `LDG.E.128`.
      operands: the rest of the line.
      guarded: whether a predicate guards it.
    """

    name: str
    operands: str
    guarded: bool

    @property
    def kind(self) -> str:
        """The kind, one of `KINDS` or "other"."""
        parts = self.name.split(".")
        return _KIND.get(".".join(parts[:2]), _KIND.get(parts[0], "other"))

    @property
    def load_bytes(self) -> int | None:
        """Bytes that a thread loads from global memory. None: not a global load."""
        parts = self.name.split(".")
        if parts[0] not in ("LDG", "LDGSTS"):
            return None
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in parts if part in widths), 4)


@dataclass(frozen=True)
class Listing:
    """The instructions of a kernel and their control flow.

    Attributes:
      instructions: all instructions in the order of their addresses.
      successors: for each instruction, the numbers of those that may execute next. Empty for dead code.
    """

    instructions: tuple[Instruction, ...]
    successors: tuple[tuple[int, ...], ...]

    def kinds(self, numbers: Iterable[int]) -> Counter[str]:
        """The number of these instructions of each kind."""
        return Counter(self.instructions[number].kind for number in numbers)


def parse(sass: str) -> Listing:
    """Parses the listing of one kernel by `nvdisasm -c`.

    Raises:
      SpqrError: an instruction jumps to an address that is known only at run time.

    Example:
      >>> parse("/*0000*/ MOV R1, R2 ;\\n/*0010*/ EXIT ;").successors
      ((1,), ())
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for guard, name, operands, label in _LINE.findall(sass):
        if label:
            labels[label] = len(instructions)
        else:
            instructions.append(Instruction(name, operands, bool(guard)))
    successors: list[tuple[int, ...]] = [()] * len(instructions)
    seen, stack = {0}, [0]
    # Follow reachable code only: dead code includes returns from functions called by diverged warps.
    while stack:
        number = stack.pop()
        following = _successors(number, instructions[number], labels)
        successors[number] = tuple(n for n in following if n < len(instructions))
        stack += set(successors[number]) - seen
        seen.update(successors[number])
    return Listing(tuple(instructions), tuple(successors))


def reachable(listing: Listing) -> list[int]:
    """The numbers of the reachable instructions in reverse postorder. Padding is not reachable.

    Example:
      >>> reachable(parse("/*0000*/ EXIT ;\\n/*0010*/ NOP ;"))
      [0]
    """
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(listing.successors[0]))]
    while stack:
        number, following = stack[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(listing.successors[successor])))
                break
        else:
            order.append(number)
            stack.pop()
    return order[::-1]


def through(listing: Listing, numbers: Iterable[int]) -> frozenset[int]:
    """These instructions with all their ancestors and descendants in the control flow.

    Example:
      >>> through(parse("/*0000*/ MOV R1, R2 ;\\n/*0010*/ EXIT ;"), [1])
      frozenset({0, 1})
    """
    return frozenset(_closure(numbers, _predecessors(listing)) | _closure(numbers, listing.successors))


def _closure(numbers: Iterable[int], neighbours: Sequence[Iterable[int]]) -> set[int]:
    found = set(numbers)
    stack = list(found)
    while stack:
        new = set(neighbours[stack.pop()]) - found
        found |= new
        stack += new
    return found


def _predecessors(listing: Listing) -> list[list[int]]:
    """The predecessors of each instruction. Dead code is no predecessor."""
    predecessors: list[list[int]] = [[] for _ in listing.instructions]
    for number, following in enumerate(listing.successors):
        for successor in following:
            predecessors[successor].append(number)
    return predecessors


def loops(listing: Listing) -> list[frozenset[int]]:
    """The natural loops: the instructions of each, including its inner loops.

    A branch closes a loop if its target dominates it. The loop is all code on paths from the target to the branch. Cold
    code that was moved to the end of the program and branches back is therefore no loop.

    Example:
      >>> loops(parse("/*0000*/ NOP ;\\n.L_x_1:\\n/*0010*/ @P0 BRA `(.L_x_1) ;\\n/*0020*/ EXIT ;"))
      [frozenset({1})]
    """
    order = reachable(listing)
    place = {number: i for i, number in enumerate(order)}
    predecessors = _predecessors(listing)
    dominator = _dominators(order, place, predecessors)
    bodies: dict[int, set[int]] = {}
    for number in order:
        for head in listing.successors[number]:
            if place[head] <= place[number] and _dominates(head, number, dominator):
                body, stack = bodies.setdefault(head, {head}), [number]
                while stack:
                    if (member := stack.pop()) not in body:
                        body.add(member)
                        stack += predecessors[member]
    return [frozenset(body) for body in bodies.values()]


def _dominators(order: list[int], place: dict[int, int], predecessors: Sequence[Sequence[int]]) -> dict[int, int]:
    """The immediate dominator of each instruction (Cooper, Harvey and Kennedy 2001)."""
    dominator = {order[0]: order[0]}

    def meet(a: int, b: int) -> int:
        while a != b:
            if place[a] > place[b]:
                a = dominator[a]
            else:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            known = [p for p in predecessors[number] if p in dominator]
            new = known[0]
            for other in known[1:]:
                new = meet(new, other)
            if dominator.get(number) != new:
                dominator[number], changed = new, True
    return dominator


def _dominates(head: int, number: int, dominator: dict[int, int]) -> bool:
    while number != head and dominator[number] != number:
        number = dominator[number]
    return number == head


def _successors(number: int, instruction: Instruction, labels: dict[str, int]) -> tuple[int, ...]:
    name = instruction.name.split(".")[0]
    if name == "EXIT":
        return (number + 1,) if instruction.guarded else ()
    if name in ("RET", "BRX", "JMX"):
        raise SpqrError(f"the target of {name} is known only at run time, so its kernel cannot be analyzed")
    # CALL.REL.NOINC is a far branch that never returns. Assume that warps do not diverge: then BRA.DIV falls through
    # instead of entering the code for diverged threads, and BRA.CONV skips the code that reconverges them.
    if name in ("BRA", "CALL") and not instruction.name.startswith("BRA.DIV"):
        before, label = re.fullmatch(r"(.*?)`\((\S+)\)", instruction.operands).groups()  # type: ignore[union-attr]
        if (instruction.guarded or before) and not instruction.name.startswith("BRA.CONV"):
            return labels[label], number + 1
        return (labels[label],)
    return (number + 1,)
