"""JSON objects in files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import SpqrError
from spqr_jax.storage.errors import CheckpointError


def read_json(path: Path, error: type[SpqrError] = CheckpointError) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      `error`: the file cannot be read, or its content is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause
    # Nested too deeply for the parser, it is a RecursionError.
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON: {cause}") from cause
    if isinstance(content, dict):
        return content
    raise error(f"{path} is not a JSON object, but {type(content).__name__}")


def finite(value: Any) -> Any:
    """The value with null in the place of NaN and of infinities, which JSON lacks.

    Example:
      >>> finite({"error": math.nan, "sizes": (1.5, math.inf)})
      {'error': None, 'sizes': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented for readers."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
