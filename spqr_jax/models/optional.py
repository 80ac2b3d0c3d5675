"""Fields of configurations that only some models need: checkpoints of the others do without them."""

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")

_OPTIONAL = "optional"


def optional(default: T) -> T:
    """A field that is left out of a description where it has its default.

    A field that a later release adds must be one: descriptions of earlier releases then stay as they are.
    """
    field: Any = dataclasses.field(default=default, metadata={_OPTIONAL: True})
    return field


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it: objects and lists, without optional fields that have their default.

    Example:
      >>> from spqr_jax.models import RotaryConfig
      >>> "share" in as_dict(RotaryConfig()), "share" in as_dict(RotaryConfig(share=0.5))
      (False, True)
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    values = {name: getattr(config, name) for name in fields}
    return {
        name: _plain(value)
        for name, value in values.items()
        if not (fields[name].metadata.get(_OPTIONAL) and value == fields[name].default)
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_dict(value)
    return list(value) if isinstance(value, tuple) else value
