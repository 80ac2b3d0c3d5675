"""Paths as users write them: relative, or with `~` for the home directory."""

import os
from os import PathLike
from pathlib import Path


def absolute(path: str | PathLike[str]) -> Path:
    """The absolute path, with `~` expanded and links kept: it stays valid when the working directory changes.

    Example:
      >>> absolute("tiny-spqr") == Path.cwd() / "tiny-spqr"
      True
      >>> absolute("~/tiny-spqr") == Path.home() / "tiny-spqr"
      True
    """
    # On text: a Path drops the "./" by which users name a directory that is called "~".
    return Path(os.path.expanduser(path)).absolute()


def resolved(path: str | PathLike[str]) -> Path:
    """The absolute path without links and `..`, for a directory to write.

    Example:
      >>> resolved("tiny-spqr/..") == Path.cwd().resolve()
      True
    """
    return absolute(path).resolve()
