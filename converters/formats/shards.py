"""Weights of a Hugging Face directory: one file, or shards and an index, in any format of files."""

import os.path
from collections.abc import Callable
from pathlib import Path

from converters.errors import ConversionError
from converters.layout import StoredTensor
from spqr_jax.storage.json_files import read_json


def index_of(single: str) -> str:
    """Name of the index of shards, from the name of a single file."""
    return f"{single}.index.json"


def holds(directory: Path, single: str) -> bool:
    """Whether a directory has the single file, or an index in its place."""
    return (directory / single).is_file() or (directory / index_of(single)).is_file()


def open_shards(
    directory: Path, single: str, open_file: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Names, shapes and readers of all tensors in `directory`.

    Args:
      directory: where the files are.
      single: name of the file that holds everything, such as `model.safetensors`; shards have an index in its place.
      open_file: lists the tensors of one file.

    Raises:
      ConversionError: there is neither the file nor an index, or a shard is missing or not beside its index.

    Example:
      >>> from converters.formats.safetensors import _open_file
      >>> open_shards(Path("HuggingFaceTB/SmolLM2-135M"), "model.safetensors", _open_file)["model.norm.weight"].shape
      (64,)
    """
    if (directory / single).is_file():
        return open_file(directory / single)
    index = directory / index_of(single)
    if not index.is_file():
        raise ConversionError(f"{directory} holds neither {single} nor {index.name}")
    weight_map = read_json(index, ConversionError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ConversionError(f"{index} has no weight_map from tensor names to file names")
    shards = {shard: open_file(_beside(index, shard)) for shard in sorted(set(weight_map.values()))}
    # A tensor in the index that its shard lacks is dropped here, and so reported with the missing ones.
    return {name: shards[shard][name] for name, shard in weight_map.items() if name in shards[shard]}


def _beside(index: Path, shard: str) -> Path:
    path = index.parent / shard
    if path.parent != index.parent:
        raise ConversionError(f"{index} refers to {shard}, which is not in the same directory")
    if not os.path.isfile(path):  # false also for a name that no file can have
        raise ConversionError(f"{path} is missing, but {index.name} refers to it")
    return path
