"""Load a model of another project: from a Hugging Face directory or hub id, or from a GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerFast

from converters.errors import ConversionError
from converters.families import FAMILIES, Family
from converters.gguf_file import open_gguf
from converters.gguf_tokenizer import build_tokenizer
from converters.json_files import read_json
from converters.safetensors_files import INDEX, open_safetensors
from converters.tensors import Params, assemble
from spqr_jax.models import Decoder

HUB_FILES = ("config.json", "model*.safetensors", INDEX, "tokenizer*", "special_tokens_map.json", "chat_template*")


class Pretrained(NamedTuple):
    """A model, its parameters (NumPy arrays, in host memory) and its tokenizer, None if the checkpoint has none."""

    model: Decoder
    params: Params
    tokenizer: PreTrainedTokenizerFast | None


def from_pretrained(path_or_hub_id: str | PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Pretrained:
    """Reads a LLaMA checkpoint into a Flax model, its parameters and its tokenizer.

    Tensors are read one at a time, so the peak is the parameters and one tensor. They stay in host memory, because a
    model to be quantized may be larger than the accelerator's; `jax.device_put(params)` moves them.

    Args:
      path_or_hub_id: a directory with `config.json` and `model.safetensors` (or an index and its shards), a `.gguf`
        file, or a repository of the Hugging Face hub, of which only those files are downloaded. The cache and
        `HF_HUB_OFFLINE` are respected; code of a checkpoint is never run.
      dtype: type of the parameters and of the model's activations.

    Returns:
      `(model, params, tokenizer)`; every `kernel` is `[in, out]`.

    Raises:
      ConversionError: a file is missing or damaged, the model is of another family or uses an option that is not
        supported, or its tensors are not the expected ones (all misfits in one error).

    Example:
      >>> model, params, tokenizer = from_pretrained("HuggingFaceTB/SmolLM2-135M")
      >>> logits = model.apply({"params": params}, jnp.array([tokenizer.encode("The sky is")]))
    """
    path = Path(path_or_hub_id)
    if path.is_file():
        return _from_gguf(path, dtype)
    return _from_directory(path if path.is_dir() else _download(str(path_or_hub_id)), dtype)


def _from_directory(directory: Path, dtype: DTypeLike) -> Pretrained:
    path = directory / "config.json"
    content = read_json(path)
    family = _family(content.get("model_type"), path)
    with _naming(path):
        config = family.from_huggingface(content)
    tokenizer = _tokenizer(directory)
    layout = family.layout(config, "huggingface")
    params = assemble(layout, open_safetensors(directory), dtype=dtype, origin=directory)
    return Pretrained(family.model(config, dtype=jnp.dtype(dtype)), params, tokenizer)


def _from_gguf(path: Path, dtype: DTypeLike) -> Pretrained:
    file = open_gguf(path)
    family = _family(file.metadata.get("general.architecture"), path)
    with _naming(path):
        config = family.from_gguf(file)
        tokenizer = build_tokenizer(file.metadata)
    params = assemble(family.layout(config, "gguf"), file.tensors, dtype=dtype, origin=path)
    return Pretrained(family.model(config, dtype=jnp.dtype(dtype)), params, tokenizer)


def _family(name: str | None, path: Path) -> Family:
    if name not in FAMILIES:
        raise ConversionError(f"{path} is a model of type {name!r}; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def _tokenizer(directory: Path) -> PreTrainedTokenizerFast | None:
    if not (directory / "tokenizer.json").is_file():
        if (directory / "tokenizer.model").is_file():
            raise ConversionError(
                f"{directory} has a tokenizer.model but no tokenizer.json; transformers' AutoTokenizer can write one."
            )
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the Rust library raises plain Exception
        raise ConversionError(f"{directory / 'tokenizer.json'} cannot be read: {error}.") from error


def _download(hub_id: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{hub_id} is neither a file nor a directory, nor on the hub: {reason}") from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before the message of an error in its content."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
