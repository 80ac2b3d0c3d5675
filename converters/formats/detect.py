"""The forms of checkpoints of other projects, and which one a path holds."""

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.formats import hub, pytorch, safetensors
from converters.formats.gguf.file import is_gguf, open_gguf
from converters.formats.json_files import read_json
from converters.formats.official.directory import ARGUMENTS, UNQUANTIZED, is_official_directory, open_official_directory
from converters.formats.official.hf_spqr import open_hf_spqr
from converters.formats.pytorch import open_pytorch
from converters.formats.safetensors import open_safetensors
from converters.formats.shards import holds
from converters.layout import StoredTensor
from spqr_jax.storage.checkpoint import is_checkpoint

CONFIG = "config.json"


class Form(StrEnum):
    """How a checkpoint is stored."""

    GGUF = "GGUF file"
    SAFETENSORS = "Hugging Face directory, safetensors"
    PYTORCH = "Hugging Face directory, PyTorch"
    HF_SPQR = "Hugging Face directory, SpQR"
    OFFICIAL_SPQR = "official SpQR directory"


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors have not been read yet.

    Attributes:
      form: how it is stored.
      path: the file or directory that holds the tensors.
      description: the file that says what model it is: a `config.json`, which has the tokenizer's files beside it, or
        the GGUF file itself.
      metadata: content of the description, without a `quantization_config` that has been followed.
      tensors: names, shapes and readers; matrices that SpQR has packed give an `SpqrTensor`.
    """

    form: Form
    path: Path
    description: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def model_type(self) -> str | None:
        """The family of models, in the checkpoint's own words."""
        return self.metadata.get("general.architecture" if self.form is Form.GGUF else "model_type")


def open_source(path_or_hub_id: str | PathLike[str]) -> Source:
    """Looks what form a checkpoint has, and lists what is in it.

    Args:
      path_or_hub_id: a GGUF file; a directory with `config.json` and `model.safetensors` or `pytorch_model.bin` (or an
        index and its shards), dense or packed by SpQR; a directory that the official SpQR code has written; or a
        repository of the Hugging Face hub.

    Raises:
      ConversionError: there is nothing there, it has none of these forms, or a file is missing or damaged.

    Example:
      >>> open_source("model.gguf").form
      <Form.GGUF: 'GGUF file'>
    """
    path = Path(path_or_hub_id)
    if path.is_file():
        return _from_file(path)
    if not path.exists():
        path = hub.download_checkpoint(str(path_or_hub_id))
    if is_official_directory(path):
        return _from_official(path)
    return _from_huggingface(path)


def _from_file(path: Path) -> Source:
    if is_gguf(path):
        file = open_gguf(path)
        return Source(Form.GGUF, path, path, file.metadata, file.tensors)
    raise ConversionError(
        f"{path} is not a GGUF file; of a checkpoint in any other form, give the directory with its {CONFIG}."
    )


def _from_huggingface(directory: Path) -> Source:
    if holds(directory, safetensors.SINGLE):
        form, open_tensors = Form.SAFETENSORS, open_safetensors
    elif holds(directory, pytorch.SINGLE):
        form, open_tensors = Form.PYTORCH, open_pytorch
    elif is_checkpoint(directory):
        raise ConversionError(f"{directory} is a checkpoint of this project, which spqr_jax.load reads.")
    else:
        raise ConversionError(
            f"{directory} holds neither {safetensors.SINGLE} nor {pytorch.SINGLE}, nor the .index.json of "
            f"either, nor {ARGUMENTS} with {UNQUANTIZED}; of a GGUF file, give its own path."
        )
    metadata = read_json(directory / CONFIG)
    tensors = open_tensors(directory)
    quantization = metadata.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "spqr":
        metadata = {key: value for key, value in metadata.items() if key != "quantization_config"}
        form, tensors = Form.HF_SPQR, open_hf_spqr(tensors, quantization, directory)
    return Source(form, directory, directory / CONFIG, metadata, tensors)


def _from_official(directory: Path) -> Source:
    tensors, model = open_official_directory(directory)
    description = _directory_of(model, directory) / CONFIG
    return Source(Form.OFFICIAL_SPQR, directory, description, read_json(description), tensors)


def _directory_of(model: str, directory: Path) -> Path:
    """Where the configuration and the tokenizer of the model are from which a directory was made."""
    if os.path.isdir(model):  # false also for a name that no directory can have
        return Path(model)
    try:
        return hub.download_description(model)
    except ConversionError as error:
        raise ConversionError(
            f"{directory} has no {CONFIG}, and neither is there one at {model}, where by its {ARGUMENTS} the model "
            f"came from; copy the model's {CONFIG} and tokenizer files into the directory."
        ) from error
