"""Options of a checkpoint's configuration, checked as they are read."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError


def require_neutral(content: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises a ConversionError for an option whose value is not among those that change nothing."""
    for key, values in neutral.items():
        if key in content and content[key] not in values:
            choice = " or ".join(repr(value) for value in values if value is not None) or "its absence"
            raise ConversionError(f"{key} {content[key]!r} is not supported, only {choice}.")


def size(content: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; null means the default, and a GGUF list of one per block must be of equal ones."""
    value = content.get(key)
    value = default if value is None else value
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise ConversionError(f"{key} must be a positive integer, found {value!r}.")
    return value


def number(content: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = content.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float):
        raise ConversionError(f"{key} must be a number, found {value!r}.")
    return float(value)
