"""JSON objects in files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spqr_jax.storage.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      CheckpointError: the file cannot be read, or its content is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict):
        return content
    raise CheckpointError(f"{path} is not a JSON object, but {type(content).__name__}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented for readers."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
