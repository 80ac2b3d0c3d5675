"""Reads and checks options of a checkpoint's configuration."""

import sys
from collections.abc import Mapping, Set

from converters.errors import ConversionError

Options = Mapping[str, object]
"""Content of a `config.json`, or a GGUF file's keys."""
Neutral = Mapping[str, tuple[object, ...]]
"""Options that change what a model computes, each with the values under which it does not."""


def require_neutral(content: Options, neutral: Neutral) -> None:
    """Raises a ConversionError for an option whose value is not among those that change nothing."""
    for key, values in neutral.items():
        if key in content and content[key] not in values:
            choice = " or ".join(repr(value) for value in values if value is not None) or "its absence"
            raise ConversionError(f"{key} {content[key]!r} is not supported, only {choice}")


def require_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raises a ConversionError where key-value heads do not serve equally many attention heads each."""
    if num_heads % num_kv_heads:
        raise ConversionError(f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")


def require_even(head_dim: int) -> None:
    """Raises a ConversionError for heads whose features cannot be rotated in pairs."""
    if head_dim % 2:
        raise ConversionError(f"heads of {head_dim} features are not supported, only of an even number")


def size(content: Options, key: str, default: int | None = None) -> int:
    """A positive integer of 32 bits; null means the default, and a GGUF list of one per block must be of equal ones."""
    value = content.get(key)
    value = default if value is None else value
    if isinstance(value, list) and len(set(map(repr, value))) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConversionError(f"{key} must be a positive integer below 2^31, found {value!r}")
    return value


def number(content: Options, key: str, default: float | None = None) -> float:
    """A finite number; null means the default."""
    value = content.get(key)
    value = default if value is None else value
    # False for NaN too; math.isfinite raises for integers beyond every float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ConversionError(f"{key} must be a number, found {value!r}")
    return float(value)


def numbers(content: Options, key: str) -> tuple[float, ...]:
    """A list of finite numbers."""
    values = content.get(key)
    if not isinstance(values, list | tuple):
        raise ConversionError(f"{key} must be a list of numbers, found {values!r}")
    return tuple(number({key: value}, key) for value in values)


def flag(content: Options, key: str, default: bool) -> bool:
    """True or false, nothing else: readers differ in whether null means false or the default."""
    value = content.get(key, default)
    if not isinstance(value, bool):
        raise ConversionError(f"{key} must be true or false, found {value!r}")
    return value


def gguf_options(metadata: Options, architecture: str, known: Set[str], neutral: Neutral) -> dict[str, object]:
    """A GGUF file's keys that begin with the architecture, without it; unknown ones might change the model.

    Raises:
      ConversionError: a key is neither known nor neutral, or has a value that is not neutral.
    """
    prefix = f"{architecture}."
    content = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    unknown = content.keys() - known - neutral.keys()
    if unknown:
        raise ConversionError(f"options are not supported: {', '.join(f'{prefix}{key}' for key in sorted(unknown))}")
    require_neutral(content, neutral)
    return content
