"""A model as one directory: its parameters, its configuration and its tokenizer.

Content of such a directory:

  * `spqr.json`: the model, and shape, type and size of each array, see `describe`;
  * `params/`: for each entry at the top of the parameter tree, such as `layers_0`, a directory in Orbax's format with
    its arrays, each under its whole path (`layers_0.q_proj.kernel.codes`);
  * `tokenizer/`: the files of the tokenizer's `save_pretrained`, if there is a tokenizer;
  * `quantization.json`: settings and reports of the quantization, if `quantize_checkpoint` wrote the checkpoint, see
    `spqr_jax.storage.record`;
  * `README.md`: a model card, for people, see `spqr_jax.storage.model_card`;
  * `manifest.json`: size and BLAKE2b checksum of every file but itself and the card, checked at loading.

A directory gets its name only when all its content is on the disk. An interrupted save leaves
`<name>.incomplete-<random>` beside it, which can be deleted.
"""

import shutil
from collections.abc import Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from spqr_jax.models import Decoder
from spqr_jax.models.decoder import Params
from spqr_jax.models.layers import mesh_of
from spqr_jax.models.stacked_blocks import unstack_blocks
from spqr_jax.storage.description import (
    Description,
    Entries,
    describe,
    described_model,
    family_name,
    joined_entries,
    write_description,
)
from spqr_jax.storage.destination import check_destination
from spqr_jax.storage.directories import existing_parent, new_directory
from spqr_jax.storage.errors import CheckpointError, reason
from spqr_jax.storage.layout import TOKENIZER, is_checkpoint
from spqr_jax.storage.manifest import verify_all, write_manifest
from spqr_jax.storage.model_card import CHECKPOINT, UNKNOWN, Origin, write_card
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.parts import host_leaves, part_names, read_part, write_part
from spqr_jax.storage.paths import resolved
from spqr_jax.storage.tokenizer_files import write_tokenizer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_destination",
    "complete",
    "describe",
    "is_checkpoint",
    "load",
    "open_checkpoint",
    "save",
]


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
    origin: Origin = UNKNOWN,
) -> None:
    """Writes a model, dense, quantized or partly so, into a new directory that is enough to run it.

    Stacked blocks are unstacked and outliers trimmed, so no padding is stored.

    Args:
      directory: the destination; missing directories above it are made.
      model: the Flax module; its configuration and `dtype` are stored.
      params: its parameters.
      tokenizer: stored too, if given.
      overwrite: replace an existing checkpoint, once the new one is complete.
      origin: base model and record of the quantization, for the model card.

    Raises:
      CheckpointError: the destination is taken (see `check_destination`), the model's family is not supported, its
        matrices are split over devices, or writing failed, as on a full disk. The destination is then unchanged.

    Example:
      >>> save("copy", model, quantized, tokenizer=tokenizer)
      >>> sorted(path.name for path in Path("copy").iterdir())
      ['README.md', 'manifest.json', 'params', 'spqr.json', 'tokenizer']
    """
    destination = resolved(directory)
    check_destination(destination, overwrite=overwrite)
    family_name(model)
    if mesh_of(params) is not None:
        raise CheckpointError(
            "parameters that are split over devices cannot be saved: save the parameters given to shard_params"
        )
    try:
        with new_directory(destination) as incomplete:
            entries = [write_part(incomplete, name, part) for name, part in unstack_blocks(params).items()]
            complete(incomplete, model, entries, tokenizer, origin)
    except Exception as error:  # on a full disk: OSError, from TensorStore ValueError, from tokenizers plain Exception
        size = sum(leaf.nbytes for leaf in host_leaves(params).values())
        free = shutil.disk_usage(existing_parent(destination)).free
        raise CheckpointError(
            f"{destination} could not be written: {reason(error)}; its parameters take {size} bytes, {free} are free"
        ) from error


def complete(
    root: Path,
    model: Decoder,
    entries: Iterable[Entries],
    tokenizer: PreTrainedTokenizerFast | None,
    origin: Origin = UNKNOWN,
) -> None:
    """Writes tokenizer, `spqr.json`, the card and, last, the manifest into a directory that has all its parts.

    Then reads every part as `load` does, so that nothing gets a name that cannot be loaded.
    """
    if tokenizer is not None:
        write_tokenizer(root / TOKENIZER, tokenizer)
    joined = joined_entries(entries)
    write_description(root, model, joined, tokenizer=tokenizer is not None)
    write_card(root, model, joined, CHECKPOINT, origin)
    write_manifest(root)
    # Not `open_checkpoint`, which verifies the checksums that were just taken.
    for read in _source(root, describe(root)).parts.values():
        read()


def load(directory: str | PathLike[str]) -> Checkpoint:
    """Reads a checkpoint of `save` or `quantize_checkpoint`; every array has the bits that were saved.

    The arrays stay in host memory; `jax.device_put(params)` moves them.

    Raises:
      CheckpointError: there is no checkpoint, it is of another version or family, or a file is missing or damaged.

    Example:
      >>> model, params, tokenizer = load("tiny-spqr")
      >>> params["layers_0"]["q_proj"]["kernel"].shape, tokenizer.decode(tokenizer.encode("sky"))
      ((64, 64), 'sky')
    """
    source = open_checkpoint(directory)
    return Checkpoint(source.model, source.read(), source.tokenizer)


def open_checkpoint(directory: str | PathLike[str]) -> ModelSource:
    """Verifies all files of a checkpoint; its parameters are then read block by block.

    Raises:
      CheckpointError: as for `load`.

    Example:
      >>> block = open_checkpoint("tiny-dense").parts["layers_0"]()
      >>> block["q_proj"]["kernel"].shape
      (64, 64)
    """
    root = resolved(directory)
    description = describe(root)
    verify_all(root)
    return _source(root, description)


def _source(root: Path, description: Description) -> ModelSource:
    """The model of a directory, its parameters read part by part."""
    model = described_model(description, root)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / TOKENIZER) if description["tokenizer"] else None
    parts = {name: partial(read_part, root, description, name) for name in part_names(description)}
    return ModelSource(model, parts, tokenizer, root.name)
