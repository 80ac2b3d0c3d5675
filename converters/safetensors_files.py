"""The tensors of safetensors files."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from converters.errors import ConversionError
from converters.shards import index_of, open_shards
from converters.tensors import StoredTensor

SINGLE = "model.safetensors"
INDEX = index_of(SINGLE)


def open_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Names, shapes and readers of all tensors in `directory`; nothing is read before it is asked for.

    Raises:
      ConversionError: there is no safetensors file, or one is missing or damaged.
    """
    return open_shards(directory, SINGLE, _open_file)


def _open_file(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is not a readable safetensors file: {error}.") from error

    def stored(name: str) -> StoredTensor:
        def read() -> Float[np.ndarray, "..."]:
            return file.get_tensor(name)

        return StoredTensor(tuple(slices[name].get_shape()), slices[name].get_dtype(), read)

    return {name: stored(name) for name in slices}
