"""Directories that get their name only when all of their content is on the disk."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """An empty directory to be filled, which takes the place of `destination` when the block ends without an error.

    Until then it is `<name>.incomplete-<random>` beside it, and after an error it is deleted. What had the name before
    is deleted last. What is missing above the destination is made.

    Raises:
      OSError: writing failed, as on a full disk; the destination is then as it was.

    Example:
      >>> with new_directory(Path("results")) as directory:
      ...     (directory / "report.txt").write_text("done")
    """
    incomplete = _sibling(destination, "incomplete")
    incomplete.mkdir(parents=True)
    try:
        yield incomplete
        for path in (incomplete, *incomplete.rglob("*")):
            synchronize(path)
        _publish(incomplete, destination)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


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


def _publish(complete: Path, destination: Path) -> None:
    """Gives a complete directory its name; what had it before is deleted afterwards."""
    if destination.exists():
        replaced = _sibling(destination, "replaced")
        destination.rename(replaced)
        try:
            complete.rename(destination)
        except BaseException:
            replaced.rename(destination)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        complete.rename(destination)
    synchronize(destination.parent)


def _sibling(destination: Path, purpose: str) -> Path:
    return destination.with_name(f"{destination.name}.{purpose}-{uuid.uuid4().hex[:8]}")
