"""Loads models of other projects, from checkpoints of any form."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerFast

from converters.errors import ConversionError
from converters.families.base import Family
from converters.families.table import FAMILIES, GGUF_FAMILIES
from converters.formats.detect import open_source
from converters.formats.generation_config import generation_options
from converters.formats.gguf.file import GgufFile
from converters.formats.gguf.tokenizer import build_tokenizer
from converters.formats.own_types import OwnTypes, own_types
from converters.formats.source import Source
from converters.layout import Params, StoredTensor, part_readers
from spqr_jax.models import Decoder
from spqr_jax.storage.json_files import read_json
from spqr_jax.storage.model_source import ModelSource

# Files that may stand beside a `tokenizer.json`.
TOKENIZER_OPTIONS = ("tokenizer_config.json", "special_tokens_map.json")


class Pretrained(NamedTuple):
    """A model, its parameters (NumPy arrays, in host memory) and its tokenizer, None if the checkpoint has none."""

    model: Decoder
    params: Params
    tokenizer: PreTrainedTokenizerFast | None


def from_pretrained(path_or_hub_id: str | PathLike[str], *, dtype: DTypeLike | None = jnp.float32) -> Pretrained:
    """Reads a checkpoint of a supported family into a Flax model, its parameters and its tokenizer.

    Tensors are read one at a time, so the peak is the parameters and one tensor. They stay in host memory, because a
    model to be quantized may be larger than the accelerator's; `jax.device_put(params)` moves them.

    Arguments and errors are those of `open_pretrained`.

    Returns:
      `(model, params, tokenizer)`; every `kernel` is an array `[in, out]`, or an `SpqrTensor` where the checkpoint has
      it packed by SpQR.

    Example:
      >>> model, params, tokenizer = from_pretrained("HuggingFaceTB/SmolLM2-135M")
      >>> model.apply({"params": params}, jnp.array([tokenizer.encode("The sky is")])).shape
      (1, 10, 257)
    """
    source = open_pretrained(path_or_hub_id, dtype=dtype)
    return Pretrained(source.model, source.read(), source.tokenizer)


def open_pretrained(path_or_hub_id: str | PathLike[str], *, dtype: DTypeLike | None = jnp.float32) -> ModelSource:
    """Opens a checkpoint of a supported family, to read it block by block; its parameters may exceed the memory.

    Args:
      path_or_hub_id: one of
        a `.gguf` file, of any type of quantization that the `gguf` package can dequantize;
        a Hugging Face directory: `config.json` and `model.safetensors` (or an index and its shards), or the same with
        `pytorch_model.bin`, which needs PyTorch and may be held in memory whole; dense, or packed by SpQR;
        a directory that the official SpQR code has written, which needs PyTorch too; its configuration and tokenizer
        come from the directory itself or from the model that it names;
        a repository of the Hugging Face hub; only the files above are downloaded, and the cache and `HF_HUB_OFFLINE`
        are respected.
        Code in a checkpoint is never run.
      dtype: type of the dense parameters and of the model's activations; None for the checkpoint's own, see
        `converters.formats.own_types`.

    Raises:
      ConversionError: a file is missing or damaged, the model is of another family or uses an option that is not
        supported, or its tensors are not the expected ones (all misfits in one error).

    Example:
      >>> source = open_pretrained("HuggingFaceTB/SmolLM2-135M")
      >>> source.parts["layers_0"]()["q_proj"]["kernel"].shape  # [in, out]
      (64, 64)
    """
    source = open_source(path_or_hub_id)
    family = _family(source)
    with _naming(source.description):
        if source.naming == "gguf":
            config = family.from_gguf(GgufFile(source.metadata, source.tensors))
        else:
            config = family.from_huggingface(source.metadata)
        # The layout has an entry for each block, and a damaged number of blocks may be huge.
        if config.num_layers > len(source.tensors):
            raise ConversionError(
                f"the configuration has {config.num_layers} blocks, but {source.path} has {len(source.tensors)} tensors"
            )
    tokenizer = _tokenizer(source)
    layout = family.layout(config, source.naming)
    types = own_types(source) if dtype is None else OwnTypes(jnp.dtype(dtype), jnp.dtype(dtype))
    tensors = _of_language_model(source, family)
    parts = part_readers(layout, tensors, dtype=types.weights, origin=source.path)
    generation = generation_options(source)
    model = family.model(config, dtype=types.activations, alias=family.alias, generation=generation)
    return ModelSource(model, parts, tokenizer, _name(path_or_hub_id))


def _of_language_model(source: Source, family: Family) -> Mapping[str, StoredTensor]:
    """The tensors under the layout's names; of the others a warning tells."""
    if family.rename is None:
        return source.tensors
    names = {name: family.rename(name) for name in source.tensors}
    left_out = sorted({".".join(name.split(".")[:2]) for name, own in names.items() if own is None})
    if left_out:
        warnings.warn(f"{source.path}: only the text model is read, not {', '.join(left_out)}", stacklevel=3)
    return {own: source.tensors[name] for name, own in names.items() if own is not None}


def _name(path_or_hub_id: str | PathLike[str]) -> str:
    """The name of a model: of its directory or file, or its id on the hub."""
    path = Path(path_or_hub_id)
    if not path.exists():
        return str(path_or_hub_id)
    return path.resolve().stem if path.is_file() else path.resolve().name


def _family(source: Source) -> Family:
    families = GGUF_FAMILIES if source.naming == "gguf" else FAMILIES
    if not isinstance(source.model_type, str) or source.model_type not in families:
        raise ConversionError(
            f"{source.description} is a model of type {source.model_type!r}, supported are {', '.join(families)}"
        )
    return families[source.model_type]


def _tokenizer(source: Source) -> PreTrainedTokenizerFast | None:
    if source.naming == "gguf":
        with _naming(source.path):
            return build_tokenizer(source.metadata)
    directory = source.description.parent
    if not (directory / "tokenizer.json").is_file():
        if (directory / "tokenizer.model").is_file():
            raise ConversionError(
                f"{directory} has a tokenizer.model but no tokenizer.json; transformers' AutoTokenizer can write one"
            )
        return None
    options = [name for name in TOKENIZER_OPTIONS if (directory / name).is_file()]
    for name in options:
        read_json(directory / name, ConversionError)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        # Some contradictions show only in use.
        tokenizer.encode("")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises plain Exception; its panics are not even that
        beside = "".join(f" with {name}" for name in options)
        raise ConversionError(f"{directory / 'tokenizer.json'} cannot be read{beside}: {error}") from error
    return tokenizer


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prepends the file's name to the message of an error in its content."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
