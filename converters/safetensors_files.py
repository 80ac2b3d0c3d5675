"""The tensors of a Hugging Face directory: one safetensors file, or many and an index."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from converters.errors import ConversionError
from converters.json_files import read_json
from converters.tensors import StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def open_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Names, shapes and readers of all tensors in `directory`; nothing is read before it is asked for.

    Raises:
      ConversionError: there is no safetensors file, or one is missing or damaged.
    """
    if (directory / SINGLE).is_file():
        return _open_file(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise ConversionError(f"{directory} holds neither {SINGLE} nor {INDEX}.")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ConversionError(f"{directory / INDEX} has no weight_map from tensor names to file names.")
    shards = {shard: _open_file(directory / shard) for shard in sorted(set(weight_map.values()))}
    # A tensor that the index promises and its shard lacks is left out here, and so reported with the missing ones.
    return {name: shards[shard][name] for name, shard in weight_map.items() if name in shards[shard]}


def _open_file(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")
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
