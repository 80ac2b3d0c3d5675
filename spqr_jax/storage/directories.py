"""Atomic replacement of directories and files: a name appears only when all of its content is on the disk."""

import ctypes
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spqr_jax.storage.layout import DESCRIPTION, MANIFEST

# Of linux/fcntl.h and linux/fs.h, for renameat2(2).
AT_FDCWD = -100
RENAME_EXCHANGE = 2

LEFTOVER = re.compile(r"\.(incomplete|replaced)-[0-9a-f]{8}$")


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Yields an empty directory, which replaces `destination` when the block ends without an error.

    Until then its name is `<name>.incomplete-<random>`; after an error it is deleted. An existing destination keeps its
    name until it is replaced, and is deleted last. Missing directories above the destination are made.

    Raises:
      OSError: writing failed, as on a full disk. The destination is then unchanged.

    Example:
      >>> with new_directory(Path("results")) as directory:
      ...     _ = (directory / "report.txt").write_text("done")
      >>> Path("results/report.txt").read_text()
      'done'
    """
    incomplete = _sibling(destination, "incomplete")
    incomplete.mkdir(parents=True)
    try:
        yield incomplete
        synchronize_all(incomplete)
        publish(incomplete, destination)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically: a reader finds the old content or the new content."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        synchronize(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Deletes the leftovers of a killed `new_directory` or `remove_directory` in a directory."""
    for path in directory.iterdir():
        if LEFTOVER.search(path.name):
            shutil.rmtree(path)


def remove_directory(directory: Path) -> None:
    """Deletes a directory: it is renamed first, so no reader finds part of its content under its name."""
    nameless = _sibling(directory, "replaced")
    directory.rename(nameless)
    shutil.rmtree(nameless)


def synchronize_all(directory: Path) -> None:
    """Waits until a directory and all its content is on the disk."""
    for path in (directory, *directory.rglob("*")):
        synchronize(path)


def synchronize(path: Path) -> None:
    """Waits until a file, or the list of files in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that exists."""
    return next(parent for parent in path.parents if parent.exists())


def publish(complete: Path, destination: Path) -> None:
    """Gives a complete directory its name; an existing destination gets the other name, to be deleted."""
    if _is_working_directory(destination):
        _fill(complete, destination)
    elif destination.exists():
        _exchange(complete, destination)
    else:
        complete.rename(destination)
    synchronize(destination.parent)


def _is_working_directory(path: Path) -> bool:
    try:
        return path.samefile(os.curdir)
    except FileNotFoundError:  # one of them does not exist: a shell may stand in a directory that is deleted
        return False


def _fill(complete: Path, destination: Path) -> None:
    """Replaces the content of the working directory, where an exchange would leave the user's shell in the old one.

    The complete directory keeps its content, so that a run that is killed here can repeat this.
    """
    replaced = _sibling(destination, "replaced")
    replaced.mkdir()
    for path in destination.iterdir():
        path.rename(replaced / path.name)
    # A directory with a description can be overwritten, and one with a manifest counts as published.
    for path in sorted(complete.iterdir(), key=lambda path: (path.name == MANIFEST, path.name != DESCRIPTION)):
        if path.is_dir():
            shutil.copytree(path, destination / path.name, copy_function=_link)
        else:
            _link(path, destination / path.name)
    synchronize_all(destination)
    shutil.rmtree(replaced)


def _link(source: str | Path, destination: str | Path) -> None:
    """Gives a file a second name, or copies it where the file system has no such links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _exchange(first: Path, second: Path) -> None:
    """Exchanges the names of two directories, atomically on Linux and most of its file systems.

    Elsewhere a process killed between the renames leaves the directory `second` as `<name>.replaced-<random>`.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 and not renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE):
        return
    replaced = _sibling(second, "replaced")
    second.rename(replaced)
    try:
        first.rename(second)
    except BaseException:
        replaced.rename(second)
        raise
    replaced.rename(first)


def _sibling(destination: Path, purpose: str) -> Path:
    return destination.with_name(f"{destination.name}.{purpose}-{uuid.uuid4().hex[:8]}")


def bytes_on_disk(directory: Path) -> int:
    """Bytes of all files below a directory.

    Example:
      >>> bytes_on_disk(Path("tiny-spqr")) < bytes_on_disk(Path("tiny-dense"))
      True
    """
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
