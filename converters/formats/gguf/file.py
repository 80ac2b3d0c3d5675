"""The metadata and tensors of a GGUF file, dequantized by the `gguf` package."""

import math
import mmap
from collections.abc import Mapping
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
    **{f"tokenizer.ggml.{role}_token_id": int for role in ("bos", "eos", "unknown", "padding")},
}
_LIST_TYPES: dict[str, type | UnionType] = {
    "tokenizer.ggml.tokens": str,
    "tokenizer.ggml.merges": str,
    "tokenizer.ggml.scores": int | float,
    "tokenizer.ggml.token_type": int,
}
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

    A tensor's shape is `[out, in]`, as in PyTorch; the format itself names the dimensions the other way round.

    Raises:
      ConversionError: the file is damaged, big-endian, or one part of several, or the architecture or the tokenizer in
        its metadata is not of the type that the format prescribes.

    Example:
      >>> open_gguf(Path("model.gguf")).metadata["general.architecture"]  # doctest: +SKIP
      'llama'
    """
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
            metadata, entries = read_header(file)
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path} is not a readable GGUF file: {error}") from error
    _check_types(metadata, path)
    if metadata.get("split.count", 1) > 1:
        raise ConversionError(f"{path} is one of {metadata['split.count']} parts; merge them with gguf-split first")
    return GgufFile(metadata, {name: _stored(name, entry, path) for name, entry in entries.items()})


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
