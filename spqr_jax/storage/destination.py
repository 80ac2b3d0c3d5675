"""The place of a checkpoint that is to be written."""

import os
from os import PathLike

from spqr_jax.storage import layout
from spqr_jax.storage.directories import existing_parent
from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.paths import resolved


def check_destination(directory: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Raises a CheckpointError where `save` would refuse to write; to be called before long work.

    A path that exists needs `overwrite`, and must be empty or hold a checkpoint and nothing else.

    Example:
      >>> check_destination("tiny-spqr")
      Traceback (most recent call last):
        ...
      spqr_jax.storage.errors.CheckpointError: ...tiny-spqr exists already: choose another path or set overwrite ...
    """
    destination = resolved(directory)
    if not destination.exists():
        parent = existing_parent(destination)
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise CheckpointError(f"{destination} cannot be made, because {parent} is not a writable directory")
        return
    if not overwrite:
        raise CheckpointError(f"{destination} exists already: choose another path or set overwrite to replace it")
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is not a directory, so it is not overwritten: choose another path")
    found = {path.name for path in destination.iterdir()}
    foreign = found - (layout.ALL if layout.is_checkpoint(destination) else set())
    if foreign:
        raise CheckpointError(
            f"{destination} holds {min(foreign)}, which is not part of a checkpoint, so it is not overwritten: "
            "choose another path"
        )


def check_outside(destination: str | PathLike[str], source: str | PathLike[str]) -> None:
    """Raises a CheckpointError for a destination that is the source, or in its directory.

    A hub id is no directory, so it passes.

    Example:
      >>> check_outside("tiny-dense/out", "tiny-dense")
      Traceback (most recent call last):
        ...
      spqr_jax.storage.errors.CheckpointError: ...tiny-dense/out is in the source ...: choose a ...
    """
    inside, outside = resolved(destination), resolved(source)
    if outside.exists() and inside.is_relative_to(outside):
        place = "the source itself" if inside == outside else f"in the source {outside}"
        raise CheckpointError(f"{inside} is {place}: choose a destination outside of it")
