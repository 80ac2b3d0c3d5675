"""The manifest of a checkpoint: size and checksum of its files, checked when the checkpoint is opened."""

import hashlib
from pathlib import Path
from typing import Any

from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.json_files import read_json, write_json
from spqr_jax.storage.layout import CARD, MANIFEST


def write_manifest(root: Path) -> None:
    """Writes the manifest of a checkpoint whose other files are complete; the model card, for people, is not in it."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path not in (root / MANIFEST, root / CARD))
    write_json(root / MANIFEST, {path.relative_to(root).as_posix(): fingerprint(path) for path in files})


def read_manifest(root: Path) -> dict[str, Any]:
    """File, relative to the checkpoint → its fingerprint, unchecked.

    Raises:
      CheckpointError: the manifest is missing or is not a JSON object.
    """
    return read_json(root / MANIFEST)


def verify_all(root: Path) -> None:
    """Raises a CheckpointError that names the first file of a checkpoint that is missing or altered."""
    for name, expected in read_manifest(root).items():
        verify(root / name, expected)


def verify(path: Path, expected: object) -> None:
    """Raises a CheckpointError where a file does not have the fingerprint that the manifest gives."""
    found = fingerprint(path) if path.is_file() else "missing"
    if found != expected:
        raise CheckpointError(
            f"{path} is {found}, but {MANIFEST} says {expected}: copy the checkpoint again or save it anew"
        )


def fingerprint(path: Path) -> str:
    """Size and checksum of a file.

    Example:
      >>> fingerprint(Path("tiny-spqr/spqr.json"))
      '... bytes with BLAKE2b ...'
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return f"{path.stat().st_size} bytes with BLAKE2b {digest}"
