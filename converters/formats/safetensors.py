"""The tensors of safetensors files."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from converters.errors import ConversionError
from converters.formats.shards import holds, index_of, open_shards
from converters.formats.source import Form, huggingface_source
from converters.layout import StoredTensor

SINGLE = "model.safetensors"
INDEX = index_of(SINGLE)


def open_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Names, shapes and readers of all tensors in `directory`; they stay in their files until they are read.

    Raises:
      ConversionError: there is no safetensors file, or one is missing or damaged.
    """
    return open_shards(directory, SINGLE, _open_file)


def _open_file(path: Path) -> dict[str, StoredTensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    return {
        name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), partial(_read, path, name))
        for name, part in slices.items()
    }


def _read(path: Path, name: str) -> Shaped[np.ndarray, "..."]:
    # The file is mapped: were it left open, all pages that have been read would stay in memory.
    with _opened(path) as file:
        return file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is not a readable safetensors file: {error}") from error


FORM: Form = Form(
    "Hugging Face directory, safetensors",
    f"{SINGLE} or {index_of(SINGLE)}",
    lambda path: holds(path, SINGLE),
    lambda path: huggingface_source(FORM.name, path, open_safetensors),
)
