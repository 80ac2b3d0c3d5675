"""The type of a model's activations: the checkpoint's own, or on a CPU the fastest that loses no range."""

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from spqr_jax.models.decoder import Decoder

DTYPES = ("float16", "bfloat16", "float32")
"""Types that a checkpoint may have, for its activations and for the weights that are not packed."""


def computing_type(own: DTypeLike, platform: str | None = None) -> jnp.dtype:
    """Type of the activations of a model whose checkpoint has the type `own`.

    On an accelerator it is `own`. On a CPU it is float32: SmolLM2 takes 89 ms a token in float32 and 375 in bfloat16 on
    2 cores, and activations beyond 65504, the end of float16, stay finite.

    Args:
      own: type of the checkpoint, `Decoder.dtype` as it was loaded.
      platform: `cpu`, `gpu` or `tpu`; None for that of JAX's default device.

    Example:
      >>> [computing_type("bfloat16", platform).name for platform in ("cpu", "gpu")]
      ['float32', 'bfloat16']
    """
    return jnp.dtype(jnp.float32 if (platform or jax.default_backend()) == "cpu" else own)


def cache_type(model: Decoder, platform: str | None = None) -> jnp.dtype:
    """Type of the KV cache of a model: of its activations, but on a CPU float32 instead of bfloat16.

    XLA for CPUs converts all of a bfloat16 cache to write one token. With SmolLM2, a step of 8 sequences at 576 slots
    takes 284 ms then, and 92 with float32.

    Example:
      >>> [cache_type(model.clone(dtype=jnp.bfloat16), platform).name for platform in ("cpu", "gpu")]
      ['float32', 'bfloat16']
    """
    own = jnp.dtype(model.dtype)
    return computing_type(own, platform) if own == jnp.bfloat16 else own


def for_computing(model: Decoder) -> Decoder:
    """The model with activations of `computing_type`; to store it, keep the model with its own type.

    Example:
      >>> for_computing(model.clone(dtype=jnp.float16)).dtype  # on a CPU
      dtype('float32')
    """
    return model.clone(dtype=computing_type(model.dtype))
