"""Models, prompts and devices as the commands take them."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import DTypeLike
from transformers import PreTrainedTokenizerFast

from converters import open_pretrained
from pallas_kernels import SpqrTensor
from pallas_kernels.errors import SpqrError
from spqr_jax.cli.text_files import read_text
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.precision import DTYPES, for_computing
from spqr_jax.storage import checkpoint
from spqr_jax.storage.model_source import ModelSource


def load_model(source: str, dtype: str | None = None) -> tuple[Decoder, Params, PreTrainedTokenizerFast | None]:
    """Model, parameters and tokenizer of a checkpoint of ours or of another project, in the type to compute in.

    Args:
      source: a directory, a file or a hub id.
      dtype: type of the activations and of the dense parameters; None chooses it, see `models.precision`.

    Raises:
      SpqrError: the type is not supported, or the checkpoint cannot be read.
    """
    opened = open_model(source, dtype)
    if dtype is None:
        opened = _in_type(opened, for_computing(opened.model).dtype)
    return opened.model, opened.read(), opened.tokenizer


def open_model(source: str, dtype: str | None = None) -> ModelSource:
    """A checkpoint of ours or of another project, opened without reading its parameters.

    Args:
      source: a directory, a file or a hub id.
      dtype: type of the model and of its dense parameters; None keeps the checkpoint's own types.

    Raises:
      SpqrError: the type is not supported, or the checkpoint cannot be opened.
    """
    chosen = None if dtype is None else float_type(dtype)
    if not checkpoint.is_checkpoint(source):
        return open_pretrained(source, dtype=chosen)
    opened = checkpoint.open_checkpoint(source)
    return opened if chosen is None else _in_type(opened, chosen)


def _in_type(source: ModelSource, dtype: DTypeLike) -> ModelSource:
    """The source with another type of activations and of dense parameters."""

    def read(name: str) -> Params:
        leaves = flatten_dict(source.parts[name]())
        return unflatten_dict({path: _cast(leaf, dtype, ".".join((name, *path))) for path, leaf in leaves.items()})

    parts = {name: partial(read, name) for name in source.parts}
    return source._replace(model=source.model.clone(dtype=dtype), parts=parts)


def _cast(leaf: Any, dtype: DTypeLike, name: str) -> Any:
    """A dense weight in another type; packed matrices stay as they are."""
    if isinstance(leaf, SpqrTensor) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    with np.errstate(over="ignore"):
        weight = leaf.astype(dtype)
    if dtype == jnp.float16 and not np.isfinite(weight).all():
        largest = float(np.abs(leaf).max())
        raise SpqrError(f"{name} has weights up to {largest:g}, too large for float16: choose bfloat16 or float32")
    return weight


def float_type(name: str) -> jnp.dtype:
    """The floating-point type of a name.

    Raises:
      SpqrError: it is none of `models.precision.DTYPES`.

    Example:
      >>> float_type("bfloat16")
      dtype(bfloat16)
    """
    if name not in DTYPES:
        raise SpqrError(f"dtype is {name}, but must be a floating-point type: float16, bfloat16 or float32")
    return jnp.dtype(name)


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
