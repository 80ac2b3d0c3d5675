"""The metadata and tensors of a GGUF file, dequantized by the `gguf` package."""

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType

import gguf
import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.formats.gguf.header import Entry, Metadata, read_header
from converters.formats.source import Form, Source
from converters.layout import StoredTensor

# Keys whose values are used unchanged. The sizes and options of a model are checked where they are read.
_TYPES: dict[str, type] = {
    "general.architecture": str,
    "split.count": int,
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    **{f"tokenizer.ggml.{role}_token_id": int for role in ("bos", "eos", "eot", "eom", "unknown", "padding")},
}
_LIST_TYPES: dict[str, type | UnionType] = {
    "tokenizer.ggml.tokens": str,
    "tokenizer.ggml.merges": str,
    "tokenizer.ggml.scores": int | float,
    "tokenizer.ggml.token_type": int,
}
# The names that llama.cpp gives to the parts of a split file.
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# One entry for each token.
_PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


@dataclass(frozen=True)
class GgufFile:
    """Content of a GGUF file; the tensors stay in the file until they are read."""

    metadata: Metadata
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that says that it is GGUF, by its name or in its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_gguf(path: Path) -> GgufFile:
    """Lists the content of a GGUF file; tensors stay in the file until they are read.

    A tensor's shape is `[out, in]`, as in PyTorch; the format itself names the dimensions the other way round. A file
    that is split into parts, `…-00001-of-0000N.gguf`, is read from all of them, whichever is given.

    Raises:
      ConversionError: a file is damaged or big-endian, a part is missing or of another file, or the architecture or the
        tokenizer in the metadata is not of the type that the format prescribes.

    Example:
      >>> open_gguf(Path("model.gguf")).metadata["general.architecture"]  # doctest: +SKIP
      'llama'
    """
    file = _open_part(path)
    count = file.metadata.get("split.count", 1)
    return _joined(path, count) if count > 1 else file


def _open_part(path: Path) -> GgufFile:
    """The content of one file."""
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
            metadata, entries = read_header(file)
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path} is not a readable GGUF file: {error}") from error
    _check_types(metadata, path)
    return GgufFile(metadata, {name: _stored(name, entry, path) for name, entry in entries.items()})


def _joined(path: Path, count: int) -> GgufFile:
    """All parts of a file, one of which is given; the first has the metadata of the model."""
    parts = [_open_part(part) for part in _parts(path, count)]
    for number, part in enumerate(parts):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (number, count):
            raise ConversionError(
                f"{path} is of {count} parts, but part {number + 1} has split.no {found[0]} and split.count "
                f"{found[1]}, not {number} and {count}: copy it again"
            )
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise ConversionError(f"{path}: {min(twice)} is in two parts")
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != total:
        raise ConversionError(f"{path} is of {total} tensors, but its {count} parts have {len(tensors)}")
    return GgufFile(parts[0].metadata, tensors)


def _parts(path: Path, count: int) -> Iterator[Path]:
    """The paths of all parts, in order."""
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise ConversionError(
            f"{path} is one of {count} parts, so its name must end in -00001-of-{count:05}.gguf: give the parts their "
            "names again, or merge them with gguf-split"
        )
    for number in range(1, count + 1):
        part = path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise ConversionError(f"{part} is missing, one of the {count} parts of a GGUF file: copy it there")
        yield part


def _open_source(path: Path) -> Source:
    file = open_gguf(path)
    return Source(FORM.name, path, path, file.metadata, file.tensors, naming="gguf")


FORM: Form = Form("GGUF file", "a .gguf file", is_gguf, _open_source)


def _check_types(metadata: Metadata, path: Path) -> None:
    for key, wanted in _TYPES.items():
        if key in metadata and not isinstance(metadata[key], wanted):
            raise ConversionError(f"{path}: {key} is not of type {wanted.__name__}")
    for key, entries in _LIST_TYPES.items():
        values = metadata.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, entries) for value in values):
            raise ConversionError(f"{path}: {key} is not a list of type {getattr(entries, '__name__', entries)}")
    count = len(metadata.get("tokenizer.ggml.tokens", ()))
    for key in _PER_TOKEN:
        if key in metadata and len(metadata[key]) != count:
            raise ConversionError(f"{path}: {key} has {len(metadata[key])} entries for {count} tokens")


def _stored(name: str, entry: Entry, path: Path) -> StoredTensor:
    def read() -> Float[np.ndarray, "..."]:
        size = math.prod(entry.byte_shape)
        # Not mapped: pages that have been read of a map stay in memory as long as it.
        stored = np.fromfile(path, np.uint8, size, offset=entry.start)
        if stored.size < size:
            raise ConversionError(f"{path} has become shorter while it was read: {name} ends beyond it")
        stored = stored.reshape(entry.byte_shape)
        try:
            with np.errstate(all="ignore"):  # scales may be infinite
                return gguf.dequantize(stored, entry.kind)
        except NotImplementedError as error:
            raise ConversionError(f"{path}: {name} has type {entry.kind.name}, which cannot be dequantized") from error

    return StoredTensor(entry.shape, entry.kind.name, read)
