"""The header of a GGUF file: metadata, and the place of each tensor.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package
makes an array for each number and each string, which takes seconds for a vocabulary. Where a damaged count leads past
the end of the file, it reads empty arrays until the count is reached.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from pallas_kernels.errors import SpqrError

Metadata = Mapping[str, Any]
"""Values under the keys of a GGUF file."""

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
# Bytes of a string, and bytes or entries of a list, far beyond any real metadata.
_MAX_LENGTH = 2**26

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Entry:
    """A tensor in the file.

    Attributes:
      shape: as in PyTorch, the features of a row last.
      kind: type of its numbers.
      start: its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of its bytes, those of a row last."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * size)


def read_header(file: mmap.mmap) -> tuple[Metadata, dict[str, Entry]]:
    """Metadata and tensors of a GGUF file, under their names.

    Raises:
      SpqrError: the file is damaged, or of a version or byte order that is not supported.
    """
    if _take(file, 4) != b"GGUF":
        raise SpqrError("it does not begin with GGUF")
    version = _integer(file, "<I")
    if version & 0xFFFF == 0:
        raise SpqrError("its bytes are in the other order, which is not supported")
    if version not in _VERSIONS:
        raise SpqrError(f"it is of version {version}, but supported are {' and '.join(map(str, _VERSIONS))}")
    tensor_count, key_count = _integer(file, "<Q"), _integer(file, "<Q")
    metadata: dict[str, object] = {}
    for _ in range(key_count):
        key = _string(file)
        _require_new(key, metadata)
        metadata[key] = _value(file, GGUFValueType(_integer(file, "<I")))
    found: dict[str, Entry] = {}
    for _ in range(tensor_count):
        name = _string(file)
        _require_new(name, found)
        found[name] = _entry(file)
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise SpqrError(f"general.alignment is {alignment!r}")
    origin = -(-file.tell() // alignment) * alignment
    return metadata, {name: _placed(entry, origin, name, len(file)) for name, entry in found.items()}


def _placed(entry: Entry, origin: int, name: str, file_size: int) -> Entry:
    """The entry with its start relative to the start of the file."""
    block, _ = GGML_QUANT_SIZES[entry.kind]
    if entry.shape[-1] % block:
        raise SpqrError(f"{name} has {entry.shape[-1]} features, not a multiple of {entry.kind.name}'s {block}")
    placed = Entry(entry.shape, entry.kind, origin + entry.start)
    end = placed.start + math.prod(placed.byte_shape)
    if end > file_size:
        raise SpqrError(f"{name} ends at byte {end}, but the file has {file_size} bytes")
    return placed


def _entry(file: mmap.mmap) -> Entry:
    dimensions = _integer(file, "<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise SpqrError(f"a tensor has {dimensions} dimensions")
    shape = tuple(_integer(file, "<Q") for _ in range(dimensions))
    return Entry(shape[::-1], GGMLQuantizationType(_integer(file, "<I")), _integer(file, "<Q"))


def _value(file: mmap.mmap, kind: GGUFValueType) -> object:
    if kind is GGUFValueType.STRING:
        return _string(file)
    if kind is not GGUFValueType.ARRAY:
        return _numbers(file, kind, 1)[0]
    kind, count = GGUFValueType(_integer(file, "<I")), _integer(file, "<Q")
    if kind is GGUFValueType.ARRAY:
        raise SpqrError("it has lists of lists, which are not supported")
    if kind is not GGUFValueType.STRING:
        return _numbers(file, kind, count)
    _require_length(count)
    return [_string(file) for _ in range(count)]


def _numbers(file: mmap.mmap, kind: GGUFValueType, count: int) -> list[int | float | bool]:
    dtype = np.dtype(_NUMBERS[kind])
    return np.frombuffer(_take(file, count * dtype.itemsize), dtype).tolist()


def _string(file: mmap.mmap) -> str:
    return _take(file, _integer(file, "<Q")).decode("utf-8")


def _integer(file: mmap.mmap, code: str) -> int:
    return struct.unpack(code, _take(file, struct.calcsize(code)))[0]


def _take(file: mmap.mmap, size: int) -> bytes:
    _require_length(size)
    content = file.read(size)
    if len(content) < size:
        raise SpqrError(f"it ends after {len(file)} bytes, but {size - len(content)} more are expected")
    return content


def _require_length(length: int) -> None:
    if length > _MAX_LENGTH:
        raise SpqrError(f"a string or list of length {length} cannot be metadata")


def _require_new(name: str, known: Mapping[str, object]) -> None:
    if name in known:
        raise SpqrError(f"{name} occurs twice")
