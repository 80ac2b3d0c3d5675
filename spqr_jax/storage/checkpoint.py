"""A model as one directory: its parameters, its configuration and its tokenizer.

What is in such a directory:

  * `spqr.json`: what `describe` returns, for people and programs;
  * `params/`: for each entry at the top of the parameter tree, such as `layers_0`, a directory in Orbax's format with
    its arrays, each under its whole path (`layers_0.q_proj.kernel.codes`);
  * `tokenizer/`: what the tokenizer's `save_pretrained` writes, if there is one;
  * `quantization.json`: how `quantize_checkpoint` made it, if that did, see `spqr_jax.storage.record`;
  * `manifest.json`: size and BLAKE2b checksum of every other file, checked at loading.

A directory gets its name only when all of it is on the disk. An interrupted save leaves `<name>.incomplete-<random>`
beside it, which can be deleted.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import PreTrainedTokenizerFast

from pallas_kernels import SpqrTensor, trim
from pallas_kernels.errors import SpqrError
from spqr_jax.models import FAMILIES, Decoder
from spqr_jax.models.decoder import Params
from spqr_jax.models.layers import mesh_of
from spqr_jax.models.stacked_blocks import unstack_blocks
from spqr_jax.storage.directories import existing_parent, new_directory
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.orbax_arrays import read_arrays, write_arrays

FORMAT_VERSION = 2
HEADER, MANIFEST, PARAMS, TOKENIZER, RECORD = "spqr.json", "manifest.json", "params", "tokenizer", "quantization.json"

Leaf = SpqrTensor | np.ndarray
Entries = dict[str, dict[str, Any]]


class CheckpointError(SpqrError):
    """A checkpoint that cannot be written or read; the message says why and what to do."""


class Checkpoint(NamedTuple):
    """A model, its parameters (NumPy arrays, in host memory) and its tokenizer, None if it was saved without."""

    model: Decoder
    params: Params
    tokenizer: PreTrainedTokenizerFast | None


def save(
    directory: str | PathLike[str],
    model: Decoder,
    params: Params,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model, dense, quantized or partly so, into a new directory that is enough to run it.

    Stacked blocks are unstacked and outliers trimmed, so no padding is stored.

    Args:
      directory: where to; what is missing above it is made.
      model: the Flax module; its configuration and `dtype` are stored.
      params: its parameters.
      tokenizer: stored too, if given.
      overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
      CheckpointError: the destination is taken (see `check_destination`), the model is of a family that is not
        supported, its matrices are split over devices, or writing failed, as on a full disk; the destination is then as
        it was.

    Example:
      >>> save("smollm2-spqr", model, quantized, tokenizer=tokenizer)
    """
    destination = Path(directory).resolve()
    check_destination(destination, overwrite=overwrite)
    family_name(model)
    if mesh_of(params) is not None:
        raise CheckpointError("parameters that are split over devices cannot be saved; save those they were made from.")
    try:
        with new_directory(destination) as incomplete:
            entries = [write_part(incomplete, name, part) for name, part in unstack_blocks(params).items()]
            write_description(incomplete, model, entries, tokenizer)
    except Exception as error:  # on a full disk: OSError, from TensorStore ValueError, from tokenizers plain Exception
        size = sum(leaf.nbytes for leaf in _leaves(params).values())
        free = shutil.disk_usage(existing_parent(destination)).free
        raise CheckpointError(
            f"{destination} could not be written: {reason(error)}; its parameters take {size} bytes, {free} are free."
        ) from error


def load(directory: str | PathLike[str]) -> Checkpoint:
    """Reads what `save` wrote; every array is bit for bit the one that was saved.

    The arrays stay in host memory; `jax.device_put(params)` moves them.

    Raises:
      CheckpointError: there is no checkpoint, it is of another version or family, or a file is missing or damaged.

    Example:
      >>> model, params, tokenizer = load("smollm2-spqr")
      >>> logits = model.apply({"params": jax.device_put(params)}, jnp.array([tokenizer.encode("The sky is")]))
    """
    source = open_checkpoint(directory)
    return Checkpoint(source.model, source.read(), source.tokenizer)


def open_checkpoint(directory: str | PathLike[str]) -> ModelSource:
    """Checks all files of a checkpoint; its parameters are then read block by block.

    Raises:
      CheckpointError: as for `load`.

    Example:
      >>> block = open_checkpoint("smollm2-spqr").parts["layers_0"]()
    """
    root = Path(directory).resolve()
    header = describe(root)
    for name, fingerprint in read_json(root / MANIFEST).items():
        verify(root / name, fingerprint)
    model = _model(header, root)
    names = {path.partition(".")[0] for path in (*header["dense"], *header["matrices"])}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / TOKENIZER) if header["tokenizer"] else None
    return ModelSource(model, {name: partial(_read_part, root, header, name) for name in sorted(names)}, tokenizer)


def _read_part(root: Path, header: Mapping[str, Any], name: str) -> Params:
    """What is under a name at the top of the parameter tree."""
    directory = root / PARAMS / name
    arrays: dict[str, Any] = read_arrays(directory) if directory.exists() else {}
    arrays |= {path: np.zeros(entry["shape"], jnp.dtype(entry["dtype"])) for path, entry in header["empty"].items()}
    leaves: dict[str, Any] = {path: arrays[path] for path in header["dense"] if path in arrays}
    for path, entry in header["matrices"].items():
        if f"{path}.codes" in arrays:
            own = {
                name.removeprefix(f"{path}."): array for name, array in arrays.items() if name.startswith(f"{path}.")
            }
            leaves[path] = SpqrTensor.from_arrays(own, in_features=entry["shape"][1], group_size=entry["group_size"])
    return unflatten_dict(leaves, sep=".")[name]


def describe(directory: str | PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, without reading its arrays.

    Returns:
      `version`, `family`, `alias` (only where the model has one), `dtype` (of activations) and `config` of the model;
      `tokenizer`, whether there is one;
      `matrices`, for the path of each packed matrix its `shape` (out, in), `bits`, `group_size`, `scale_bits` and
      `zero_bits` (None: not quantized), `outliers` (their number; None: quantized without) and `bytes`; `dense`, for
      the path of each other array its `shape`, `dtype` and `bytes`; `empty`, the arrays without elements, which
      Orbax does not store.

    Raises:
      CheckpointError: there is no checkpoint, it is of another version, or its `spqr.json` is damaged.

    Example:
      >>> sum(matrix["bytes"] for matrix in describe("smollm2-spqr")["matrices"].values())
    """
    root = Path(directory).resolve()
    if not root.is_dir():
        raise CheckpointError(f"{root} {'is not a directory' if root.exists() else 'does not exist'}.")
    if not is_checkpoint(root):
        raise CheckpointError(f"{root} is not a checkpoint of this library: it has no {HEADER}.")
    header = read_json(root / HEADER)
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{root / HEADER} is of format version {header.get('version')!r}, but this release reads {FORMAT_VERSION}; "
            "use the release that wrote it."
        )
    verify(root / HEADER, read_json(root / MANIFEST).get(HEADER))
    return header


def is_checkpoint(path: str | PathLike[str]) -> bool:
    """Whether a path is a directory that `save` wrote, judged by its `spqr.json`.

    Example:
      >>> model, params, tokenizer = load(path) if is_checkpoint(path) else from_pretrained(path)
    """
    return (Path(path) / HEADER).is_file()


def check_destination(directory: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Raises a CheckpointError where `save` would refuse to write; to be called before long work.

    A path that exists needs `overwrite`, and must then be empty or hold a checkpoint and nothing else.

    Example:
      >>> check_destination("smollm2-spqr")
    """
    destination = Path(directory).resolve()
    if not destination.exists():
        parent = existing_parent(destination)
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise CheckpointError(f"{destination} cannot be made, because {parent} is not a writable directory.")
        return
    if not overwrite:
        raise CheckpointError(f"{destination} exists already; choose another path or set overwrite to replace it.")
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is not a directory, so it is not overwritten; choose another path.")
    found = {path.name for path in destination.iterdir()}
    foreign = found - ({HEADER, MANIFEST, PARAMS, TOKENIZER, RECORD} if is_checkpoint(destination) else set())
    if foreign:
        raise CheckpointError(
            f"{destination} holds {min(foreign)}, which is not part of a checkpoint, so it is not overwritten; "
            "choose another path."
        )


def _leaves(params: Params) -> dict[str, Leaf]:
    """Path → packed matrix or array, in host memory and without padding."""
    flat = flatten_dict(unstack_blocks(params), sep=".")
    trimmed = {path: trim(leaf) if isinstance(leaf, SpqrTensor) else leaf for path, leaf in flat.items()}
    return jax.tree.map(np.asarray, jax.device_get(trimmed))


def _arrays(leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """Path → array, those of a packed matrix under its path and their field."""
    tree = {path: leaf.arrays() if isinstance(leaf, SpqrTensor) else leaf for path, leaf in leaves.items()}
    return flatten_dict(tree, sep=".")


def family_name(model: Decoder) -> str:
    """The key of a model's family, or a CheckpointError where it has none."""
    for name, family in FAMILIES.items():
        if type(model) is family:
            return name
    raise CheckpointError(f"a {type(model).__name__} cannot be saved; supported families: {', '.join(FAMILIES)}.")


def _packed_entry(tensor: SpqrTensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "bits": tensor.bits,
        "group_size": tensor.group_size,
        "scale_bits": None if tensor.scale_codes is None else tensor.scale_codes.shape[0],
        "zero_bits": None if tensor.zero_codes is None else tensor.zero_codes.shape[0],
        "outliers": None if tensor.outliers is None else int(tensor.outliers.count),
        "bytes": tensor.nbytes,
    }


def _dense_entry(array: np.ndarray) -> dict[str, Any]:
    return {"shape": array.shape, "dtype": array.dtype.name, "bytes": array.nbytes}


def _model(header: Mapping[str, Any], root: Path) -> Decoder:
    name = header["family"]
    if name not in FAMILIES:
        raise CheckpointError(f"{root} is a model of family {name!r}, but supported are {', '.join(FAMILIES)}.")
    config_class = get_type_hints(FAMILIES[name])["config"]
    try:
        config = _from_dict(config_class, header["config"])
    except TypeError as error:
        raise CheckpointError(f"{root / HEADER} does not fit {config_class.__name__}: {error}.") from error
    return FAMILIES[name](config, dtype=jnp.dtype(header["dtype"]), alias=header.get("alias"))


def _from_dict(cls: Any, values: Mapping[str, Any]) -> Any:
    """Inverse of `dataclasses.asdict`."""
    nested = {name: kind for name, kind in get_type_hints(cls).items() if dataclasses.is_dataclass(kind)}
    return cls(**{name: _from_dict(nested[name], v) if name in nested else v for name, v in values.items()})


def describe_model(model: Decoder) -> dict[str, Any]:
    """Family, alias (if any), type of activations and configuration of a model, as `spqr.json` has them."""
    return {
        "family": family_name(model),
        **({} if model.alias is None else {"alias": model.alias}),
        "dtype": jnp.dtype(model.dtype).name,
        "config": dataclasses.asdict(model.config),
    }


def write_part(root: Path, name: str, part: Params) -> Entries:
    """Writes what is under a name at the top of the parameter tree; returns what `spqr.json` says of it."""
    leaves = _leaves({name: part})
    arrays = _arrays(leaves)
    if stored := {path: array for path, array in arrays.items() if array.size}:
        write_arrays(root / PARAMS / name, stored)
    return {
        "matrices": {path: _packed_entry(leaf) for path, leaf in leaves.items() if isinstance(leaf, SpqrTensor)},
        "dense": {path: _dense_entry(leaf) for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)},
        "empty": {path: _dense_entry(array) for path, array in arrays.items() if array.size == 0},
    }


def write_description(root: Path, model: Decoder, entries: Iterable[Entries], tokenizer: Any) -> None:
    """Writes the tokenizer, `spqr.json` and, last, the manifest of a directory whose parts are all written."""
    if tokenizer is not None:
        tokenizer.save_pretrained(root / TOKENIZER)
    header: dict[str, Any] = {"version": FORMAT_VERSION, **describe_model(model), "tokenizer": tokenizer is not None}
    header |= {"matrices": {}, "dense": {}, "empty": {}}
    for part in entries:
        for kind, content in part.items():
            header[kind] |= content
    (root / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    files = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    manifest = {path.relative_to(root).as_posix(): _fingerprint(path) for path in files}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> str:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return f"{path.stat().st_size} bytes with BLAKE2b {digest}"


def verify(path: Path, expected: str | None) -> None:
    """Raises a CheckpointError where a file is not the one that was saved."""
    found = _fingerprint(path) if path.is_file() else "missing"
    if found != expected:
        raise CheckpointError(
            f"{path} is {found}, but {MANIFEST} says {expected}; copy the checkpoint again or save it anew."
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if isinstance(content, dict):
        return content
    raise CheckpointError(f"{path} is not a JSON object.")


def reason(error: Exception) -> str:
    """What the operating system said; TensorStore buries its error number in a long message."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error)
