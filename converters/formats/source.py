"""A checkpoint of another project, opened but not read, and the form in which it is stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converters.errors import ConversionError
from converters.formats.options import Options
from converters.layout import StoredTensor
from spqr_jax.storage.json_files import read_json

CONFIG = "config.json"

Naming = Literal["huggingface", "gguf"]
"""Whose names options and tensors have."""


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors have not been read yet.

    Attributes:
      form: name of the form in which it is stored.
      path: the file or directory that holds the tensors.
      description: the file with the model's options: a `config.json`, which has the tokenizer's files beside it, or the
        GGUF file itself.
      metadata: content of the description, without a `quantization_config` that has been followed.
      tensors: names, shapes and readers; matrices that SpQR has packed are read as an `SpqrTensor`.
      naming: whose names metadata and tensors have; GGUF's metadata hold the tokenizer too.
    """

    form: str
    path: Path
    description: Path
    metadata: Options
    tensors: Mapping[str, StoredTensor]
    naming: Naming = "huggingface"

    @property
    def model_type(self) -> object:
        """The family of models as the checkpoint names it: any JSON value, None where it is missing."""
        return self.metadata.get("general.architecture" if self.naming == "gguf" else "model_type")


@dataclass(frozen=True)
class Form:
    """A form of checkpoints.

    Attributes:
      name: what `spqr inspect` calls it.
      signs: what a path must hold, for error messages.
      detect: whether an existing path is a checkpoint of this form; forms are asked in the order of the table.
      open: lists its content.
    """

    name: str
    signs: str
    detect: Callable[[Path], bool]
    open: Callable[[Path], Source]


def huggingface_source(form: str, directory: Path, open_tensors: Callable[[Path], dict[str, StoredTensor]]) -> Source:
    """A directory with `config.json` and the tensors that a function lists.

    Raises:
      ConversionError: a file is missing or damaged.
    """
    metadata = read_json(directory / CONFIG, ConversionError)
    return Source(form, directory, directory / CONFIG, metadata, open_tensors(directory))
