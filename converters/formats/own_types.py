"""The types that a checkpoint of another project is stored in, which its model keeps."""

import math
from collections import Counter
from typing import NamedTuple

import jax.numpy as jnp

from converters.formats.source import Source
from converters.layout import PACKED
from spqr_jax.models.precision import DTYPES

_KINDS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}


class OwnTypes(NamedTuple):
    """The types of a model.

    Attributes:
      weights: of parameters that are not packed.
      activations: in which the model computes, see `Decoder.dtype`.
    """

    weights: jnp.dtype
    activations: jnp.dtype


def own_types(source: Source) -> OwnTypes:
    """The type that `config.json` names, or else that of most weights, for weights and activations alike.

    transformers takes the same type, which `config.json` has as `dtype` or, before version 5, as `torch_dtype`.

    Weights in a quantized type of GGUF become float16, in which their scales are stored. Such a file does not say what
    the model's type was, and activations may exceed float16: these are bfloat16.

    Example:
      >>> from converters.formats.detect import open_source
      >>> own_types(open_source("HuggingFaceTB/SmolLM2-135M")).weights
      dtype('float32')
    """
    named = str(source.metadata.get("dtype") or source.metadata.get("torch_dtype")).removeprefix("torch.")
    if source.naming == "huggingface" and named in DTYPES:
        return OwnTypes(jnp.dtype(named), jnp.dtype(named))
    dense = [tensor for tensor in source.tensors.values() if tensor.kind != PACKED]
    if source.naming == "gguf" and any(tensor.kind not in _KINDS for tensor in dense):
        return OwnTypes(jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
    sizes = Counter({"float32": 0})
    for tensor in dense:
        sizes[_KINDS.get(tensor.kind, "float32")] += math.prod(tensor.shape)
    most = jnp.dtype(sizes.most_common(1)[0][0])
    return OwnTypes(most, most)
