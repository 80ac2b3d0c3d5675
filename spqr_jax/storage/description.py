"""The description of a checkpoint, `spqr.json`: its model, and shape, type and size of each array."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, get_args, get_type_hints

import jax.numpy as jnp

from spqr_jax.models import FAMILIES, Decoder
from spqr_jax.models.generation_options import GenerationOptions
from spqr_jax.models.optional import as_dict
from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.json_files import read_json, write_json
from spqr_jax.storage.layout import DESCRIPTION, is_checkpoint
from spqr_jax.storage.manifest import read_manifest, verify
from spqr_jax.storage.paths import resolved

FORMAT_VERSION = 3
# Version 2 has the arrays of a part in its directory; version 3, in `arrays` below it, where Orbax's API v1 puts them.
READ_VERSIONS = (2, FORMAT_VERSION)


class MatrixEntry(TypedDict):
    """A packed matrix.

    Attributes:
      shape: (out, in), or (experts, out, in).
      bits: width of a weight code.
      group_size: consecutive input features that share a scale and a zero.
      scale_bits, zero_bits: widths of the codes of statistics; None where they are 16-bit.
      outliers: their number; None for a matrix quantized without.
      bytes: of all its arrays.
    """

    shape: Sequence[int]
    bits: int
    group_size: int
    scale_bits: int | None
    zero_bits: int | None
    outliers: int | None
    bytes: int


class ArrayEntry(TypedDict):
    """An array of any other parameter."""

    shape: Sequence[int]
    dtype: str
    bytes: int


class Entries(TypedDict):
    """Entries of some parameters, by their paths (`layers_0.q_proj.kernel`).

    Attributes:
      matrices: packed matrices.
      dense: all other arrays.
      empty: arrays without elements, which Orbax does not store; those of a packed matrix under its path and field.
    """

    matrices: dict[str, MatrixEntry]
    dense: dict[str, ArrayEntry]
    empty: dict[str, ArrayEntry]


class ModelEntry(TypedDict):
    """A model: its family, its alias if it has one, the type of its activations and its configuration."""

    family: str
    alias: NotRequired[str]
    dtype: str
    config: dict[str, Any]


class Description(ModelEntry, Entries):
    """Content of `spqr.json`.

    Attributes:
      version: of the format.
      tokenizer: whether there is one.
      generation: content of the model's `generation_config.json`, if it has any.
    """

    version: int
    tokenizer: bool
    generation: NotRequired[dict[str, Any]]


def describe(directory: str | PathLike[str]) -> Description:
    """Reads the description of a checkpoint, and none of its arrays.

    Returns:
      `version`, `family`, `alias` (if any), `dtype` (of activations) and `config` of the model; `tokenizer`, whether
      there is one; `generation`, its generation configuration (if any);
      `matrices`, `dense` and `empty`, see `Entries`.

    Raises:
      CheckpointError: there is no checkpoint, it is of another version, or its `spqr.json` is damaged.

    Example:
      >>> describe("tiny-spqr")["matrices"]["layers_0.q_proj.kernel"]["bits"]
      4
    """
    root = resolved(directory)
    if not root.is_dir():
        raise CheckpointError(f"{root} {'is not a directory' if root.exists() else 'does not exist'}")
    if not is_checkpoint(root):
        raise CheckpointError(f"{root} is not a checkpoint of this library: it has no {DESCRIPTION}")
    content: Any = read_json(root / DESCRIPTION)
    if content.get("version") not in READ_VERSIONS:
        raise CheckpointError(
            f"{root / DESCRIPTION} is of format version {content.get('version')!r}, but this release reads "
            f"{' and '.join(map(str, READ_VERSIONS))}: use the release that wrote it"
        )
    verify(root / DESCRIPTION, read_manifest(root).get(DESCRIPTION))
    return content


def write_description(root: Path, model: Decoder, entries: Entries, *, tokenizer: bool) -> None:
    """Writes `spqr.json`."""
    content: dict[str, Any] = {"version": FORMAT_VERSION, **describe_model(model), "tokenizer": tokenizer}
    if options := model.generation.content:
        content["generation"] = options
    write_json(root / DESCRIPTION, content | {**entries})


def joined_entries(parts: Iterable[Entries]) -> Entries:
    """The entries of all parts of a checkpoint."""
    joined: Entries = {"matrices": {}, "dense": {}, "empty": {}}
    for part in parts:
        joined["matrices"] |= part["matrices"]
        joined["dense"] |= part["dense"]
        joined["empty"] |= part["empty"]
    return joined


def describe_model(model: Decoder) -> ModelEntry:
    """Family, alias (if any), type of activations and configuration of a model.

    Raises:
      CheckpointError: the model's family is not supported.

    Example:
      >>> describe_model(model)["family"]
      'llama'
    """
    content: dict[str, Any] = {
        "family": family_name(model),
        **({} if model.alias is None else {"alias": model.alias}),
        "dtype": jnp.dtype(model.dtype).name,
        "config": as_dict(model.config),
    }
    return cast(ModelEntry, content)


def described_model(description: Description, root: Path) -> Decoder:
    """Makes the model of a description; `root`, the checkpoint, is named in errors.

    Raises:
      CheckpointError: the family is not supported, or the configuration does not fit it.
    """
    name = description["family"]
    if name not in FAMILIES:
        raise CheckpointError(f"{root} is a model of family {name!r}, but supported are {', '.join(FAMILIES)}")
    config_class = get_type_hints(FAMILIES[name])["config"]
    try:
        config = _from_dict(config_class, description["config"])
    except TypeError as error:
        raise CheckpointError(
            f"{root / DESCRIPTION} does not fit {config_class.__name__}: {error}; use the release that wrote it"
        ) from error
    generation = GenerationOptions.of(description.get("generation", {}))
    dtype, alias = jnp.dtype(description["dtype"]), description.get("alias")
    return FAMILIES[name](config, dtype=dtype, alias=alias, generation=generation)


def family_name(model: Decoder) -> str:
    """The key of a model's family.

    Raises:
      CheckpointError: the family is not supported.
    """
    for name, family in FAMILIES.items():
        if type(model) is family:
            return name
    raise CheckpointError(f"a {type(model).__name__} cannot be saved; supported families: {', '.join(FAMILIES)}")


def _from_dict(cls: Any, values: Mapping[str, Any]) -> Any:
    """Inverse of `as_dict`."""
    kinds = get_type_hints(cls)
    return cls(**{name: _value(kinds.get(name), value) for name, value in values.items()})


def _value(kind: Any, value: Any) -> Any:
    """A value of a field: JSON has an object for a dataclass and a list for a tuple."""
    if isinstance(value, list):
        return tuple(value)
    options = [kind, *get_args(kind)]
    nested = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return _from_dict(nested, value) if nested is not None and isinstance(value, Mapping) else value
