"""Models, prompts and devices as the commands take them."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from converters import open_pretrained
from pallas_kernels import SpqrTensor
from pallas_kernels.errors import SpqrError
from spqr_jax.cli.text_files import read_text
from spqr_jax.generation import chat_prompt
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.storage import checkpoint
from spqr_jax.storage.model_source import ModelSource


def load_model(source: str, dtype: str) -> tuple[Decoder, Params, PreTrainedTokenizerFast | None]:
    """Model, parameters and tokenizer of a checkpoint of ours or of another project.

    Args:
      source: a directory, a file or a hub id.
      dtype: type of the dense parameters.

    Raises:
      SpqrError: the type is none of JAX's, or the checkpoint cannot be read.
    """
    opened = open_model(source, dtype)
    return opened.model, opened.read(), opened.tokenizer


def open_model(source: str, dtype: str) -> ModelSource:
    """A checkpoint of ours or of another project, opened without reading its parameters.

    Args:
      source: a directory, a file or a hub id.
      dtype: type of the dense parameters.

    Raises:
      SpqrError: the type is none of JAX's, or the checkpoint cannot be opened.
    """
    floating = float_type(dtype)
    if not checkpoint.is_checkpoint(source):
        return open_pretrained(source, dtype=floating)
    opened = checkpoint.open_checkpoint(source)

    def cast(leaf: Any) -> Any:
        is_weight = not isinstance(leaf, SpqrTensor) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(floating) if is_weight else leaf

    def read(name: str) -> Params:
        return jax.tree.map(cast, opened.parts[name](), is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))

    return opened._replace(parts={name: partial(read, name) for name in opened.parts})


def float_type(name: str) -> jnp.dtype:
    """The floating-point type of a name.

    Raises:
      SpqrError: there is none of this name.

    Example:
      >>> float_type("bfloat16")
      dtype(bfloat16)
    """
    try:
        found = jnp.dtype(name)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise SpqrError(f"dtype is {name}, but must be a floating-point type: float16, bfloat16 or float32")
    return found


def require(tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedTokenizerFast:
    """The tokenizer.

    Raises:
      SpqrError: the checkpoint came without one.
    """
    if tokenizer is None:
        raise SpqrError("the checkpoint has no tokenizer: add its tokenizer.json and tokenizer_config.json")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast | None, text: str) -> list[int]:
    """Token ids of a text, without special tokens.

    Raises:
      SpqrError: the checkpoint came without a tokenizer.
    """
    return require(tokenizer)(text, add_special_tokens=False, verbose=False)["input_ids"]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids, with or without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=not special)
    assert isinstance(text, str)  # a list only of a batch
    return text


def chat_ids(tokenizer: PreTrainedTokenizerFast, message: str) -> list[int]:
    """Token ids of a message in the tokenizer's chat template, or of the message alone where it has none.

    Raises:
      SpqrError: the template refuses the message, or is damaged.
    """
    try:
        return chat_prompt(tokenizer, message)
    except TemplateError as error:
        raise SpqrError(f"the tokenizer's chat template cannot be used ({error}): use --no-chat") from None


def read_grid(file: Path) -> list[Any]:
    """The entries of a grid in a JSON file, not checked yet.

    Raises:
      SpqrError: the file is not a JSON list in UTF-8.
    """
    try:
        content = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SpqrError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise SpqrError(f'{file} is no list of settings, such as [{{"method": "spqr", "bits": [3, 4]}}]')
    return content


def mesh_of_all_devices() -> jax.sharding.Mesh | None:
    """All devices along one axis, or None if there is only one."""
    count = jax.device_count()
    return jax.make_mesh((count,), ("devices",)) if count > 1 else None
