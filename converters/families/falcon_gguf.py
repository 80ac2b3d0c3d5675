"""Falcon in GGUF: keys, and the order of the rows of q, k and v."""

import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.families import base
from converters.families.base import gguf_sizes
from converters.families.rotary import rotary_from_gguf
from converters.formats.gguf.file import GgufFile
from converters.formats.options import gguf_options, number, require_even, require_neutral
from spqr_jax.models import FalconConfig

# The layout is the order of attn_qkv's rows: see `groups_from_parts`.
_GGUF_NEUTRAL = {**base.GGUF_NEUTRAL, "tensor_data_layout": ("jploski",)}
_GGUF_KNOWN = {*base.GGUF_KNOWN, "attention.layer_norm_epsilon"}


def read_gguf(file: GgufFile, prefix: str) -> FalconConfig:
    """Configuration from a GGUF file's keys; a second norm and a tied embedding show in its tensors.

    llama.cpp runs every Falcon in parallel, with rotary embedding and without biases.

    Raises:
      ConversionError: a size is missing, differs from block to block, or an option is not supported.
    """
    content = gguf_options(file.metadata, prefix, _GGUF_KNOWN, _GGUF_NEUTRAL)
    sizes = gguf_sizes(content, file)
    require_heads(sizes["hidden_size"], sizes["num_heads"])
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    require_neutral(
        content, dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), (head_dim,))
    )
    return FalconConfig(
        **sizes,
        arrangement="parallel_two_norms" if "blk.0.attn_norm_2.weight" in file.tensors else "parallel",
        rotary=rotary_from_gguf(content),
        norm_epsilon=number(content, "attention.layer_norm_epsilon"),
    )


def groups_from_parts(
    rows: Float[np.ndarray, "out *in"], num_heads: int, num_kv_heads: int
) -> Float[np.ndarray, "out *in"]:
    """Rows of `query_key_value` in Hugging Face's order, from GGUF's: all queries, then all keys, then all values.

    Hugging Face has one group after the other, one for each key-value head: its query heads, its key and its value.
    """
    heads = rows.reshape(num_heads + 2 * num_kv_heads, -1, *rows.shape[1:])
    queries, keys, values = np.split(heads, [num_heads, num_heads + num_kv_heads])
    queries = queries.reshape(num_kv_heads, -1, *heads.shape[1:])
    return np.concatenate([queries, keys[:, None], values[:, None]], axis=1).reshape(rows.shape)


def require_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ConversionError(f"hidden_size {hidden_size} cannot be divided among {num_heads} attention heads")
    require_even(hidden_size // num_heads)
