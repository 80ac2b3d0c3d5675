"""From named tensors in files to a parameter tree: a table says where each goes, and one error lists all misfits."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from converters.errors import ConversionError
from pallas_kernels import SpqrTensor
from spqr_jax.models.decoder import Params

PACKED = "SpQR"
# Types that are not weights by themselves: integers, and numbers that need scales beside them.
_CODES = re.compile(r"BOOL|[IU]\d+|F[48](_.*)?")

Transform = Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that stays in its file until `read` is called.

    Attributes:
      shape: `[out, in]` for a matrix, packed ones too.
      kind: name of its type in the file's own words, such as `BF16` or `Q4_1`; for a packed matrix, `SpQR`.
      read: reads the array, or the packed matrix.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray | SpqrTensor]

    def read_array(self) -> np.ndarray:
        """Reads a tensor that is not packed.

        Raises:
          ConversionError: it is packed.
        """
        array = self.read()
        if isinstance(array, SpqrTensor):
            raise ConversionError(f"a tensor of type {self.kind} must be an array here")
        return array


@dataclass(frozen=True)
class Target:
    """The place of one tensor in the parameter tree.

    Attributes:
      path: its keys in the parameter tree.
      source: its name in the checkpoint.
      shape: its shape in the checkpoint.
      transform: makes the parameter from it.
      place: its index, and how many there are, where the parameter is a stack of tensors; else None.
    """

    path: tuple[str, ...]
    source: str
    shape: tuple[int, ...]
    transform: Transform = np.asarray
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """All tensors of a checkpoint.

    Attributes:
      targets: those that become parameters.
      copies: those that may be stored as well, each with the name of the target that it must equal, or in its place.
      ignored: matches the names of those that are no parameters.
    """

    targets: tuple[Target, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    ignored: re.Pattern[str] = re.compile(r"(?!)")


def part_readers(
    layout: Layout, stored: Mapping[str, StoredTensor], *, dtype: DTypeLike, origin: object
) -> dict[str, Callable[[], Params]]:
    """Readers of the entries at the top of the parameter tree; each reads its tensors one at a time.

    Args:
      layout: the tensors that must be stored.
      stored: the tensors that are.
      dtype: type of the parameters.
      origin: the file or directory, for error messages.

    Raises:
      ConversionError: tensors are missing, surplus or of another shape (one error names them all), or, when read, one
        has values that are not finite in `dtype`.

    Example:
      >>> target = Target(("norm", "scale"), "model.norm.weight", (3,))
      >>> stored = {"model.norm.weight": StoredTensor((3,), "F32", lambda: np.ones(3))}
      >>> part_readers(Layout((target,)), stored, dtype=np.float32, origin="toy")["norm"]()
      {'scale': array([1., 1., 1.], dtype=float32)}
    """
    alone = {original: stored[copy] for copy, original in layout.copies.items() if copy in stored}
    stored = {**alone, **stored}
    misfits = sorted(_misfits(layout, stored))
    if misfits:
        raise ConversionError(
            f"{origin} does not hold the tensors that its configuration calls for:\n  " + "\n  ".join(misfits)
        )
    parts: dict[str, list[Target]] = {}
    for target in layout.targets:
        parts.setdefault(target.path[0], []).append(target)
    return {name: partial(_read, targets, stored, dtype, origin) for name, targets in parts.items()}


def _read(targets: Iterable[Target], stored: Mapping[str, StoredTensor], dtype: DTypeLike, origin: object) -> Params:
    """The part of the parameter tree below an entry at its top."""
    params: Params = {}
    for target in targets:
        parent = params
        for key in target.path[1:-1]:
            parent = parent.setdefault(key, {})
        value: Any = stored[target.source].read()
        if not isinstance(value, SpqrTensor):
            # A copy, in C order: nothing in the tree refers to the file's memory.
            with np.errstate(over="ignore"):
                value = np.array(target.transform(value), dtype=dtype, order="C")
            if bad := value.size - np.count_nonzero(np.isfinite(value)):
                raise ConversionError(
                    f"{origin}: {target.source} has {bad} of {value.size} values, as {value.dtype}, NaN or infinite"
                )
        if target.place is None:
            parent[target.path[-1]] = value
            continue
        index, count = target.place
        if index == 0:
            parent[target.path[-1]] = np.empty((count, *value.shape), value.dtype)
        parent[target.path[-1]][index] = value
    return params


def _misfits(layout: Layout, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    expected = {target.source: target.shape for target in layout.targets}
    kernels = {target.source for target in layout.targets if target.path[-1] == "kernel" and target.place is None}
    for name in expected.keys() | stored.keys():
        if name in layout.copies and layout.copies[name] in stored:
            if not _same(stored[name], stored[layout.copies[name]]):
                yield f"{name}: expected equal to {layout.copies[name]}, found other values"
        elif not layout.ignored.fullmatch(name):
            wanted = list(expected[name]) if name in expected else "none"
            found = list(stored[name].shape) if name in stored else "none"
            if wanted != found:
                yield f"{name}: expected {wanted}, found {found}"
            elif _CODES.fullmatch(stored[name].kind) or (stored[name].kind == PACKED and name not in kernels):
                yield f"{name}: expected floating point, found {stored[name].kind}"


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two dense tensors have the same values; packed ones never count as equal."""
    if first is second:
        return True
    return PACKED not in (first.kind, second.kind) and np.array_equal(first.read_array(), second.read_array())
