"""The metadata and tensors of a GGUF file, dequantized by the `gguf` package."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.tensors import StoredTensor


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds; the tensors stay in the file until they are read."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def open_gguf(path: Path) -> GgufFile:
    """Maps a GGUF file into memory and lists what is in it.

    A tensor's shape is `[out, in]`, as in PyTorch; the format itself names the dimensions the other way round.

    Raises:
      ConversionError: the file is damaged, big-endian, or one part of several.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise ConversionError(f"{path} is not a readable GGUF file: {error}.") from error
    if reader.byte_order == "S":
        raise ConversionError(f"{path} is a GGUF file in the other byte order, which is not supported.")
    if metadata.get("split.count", 1) > 1:
        raise ConversionError(f"{path} is one of {metadata['split.count']} parts; merge them with gguf-split first.")
    return GgufFile(metadata, {tensor.name: _stored(tensor, path) for tensor in reader.tensors})


def _stored(tensor: gguf.ReaderTensor, path: Path) -> StoredTensor:
    def read() -> Float[np.ndarray, "..."]:
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConversionError(
                f"{path}: {tensor.name} has type {tensor.tensor_type.name}, which cannot be dequantized."
            ) from error

    return StoredTensor(tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, read)
