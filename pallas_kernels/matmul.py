"""The product of activations with a packed weight."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.backends.backend import Backend
from pallas_kernels.backends.table import Implementation, choose
from pallas_kernels.backends.xla import XLA
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor


def spqr_matmul(
    x: Float[Array | np.ndarray, "*batch in"], w: SpqrTensor, *, implementation: Implementation | None = None
) -> Float[Array, "*batch out"]:
    """y = x ŵᵀ, accumulated in float32, in x's type.

    Can be jitted, mapped (over x, over stacks of w, or both) and differentiated. XLA multiplies float32 in the
    precision of `jax.default_matmul_precision`, which on a GPU is TF32 unless set otherwise.

    Args:
      x: activations; the Pallas kernels take bfloat16, float16 and float32.
      w: the packed weight.
      implementation: name of a backend. `"pallas"` multiplies with the packed codes in one fused kernel, which the
        number of tokens selects (`tuning.regimes`). `"xla"` multiplies with the dequantized weight. `"interpret"` runs
        the Pallas kernels as XLA operations on any device, for tests. None selects Pallas on a supported GPU, and XLA
        elsewhere.

    Raises:
      SpqrError: x's last axis is not w's number of input features, or the backend is unknown or cannot run here.

    Example:
      >>> y = spqr_matmul(x, packed)
      >>> (x.shape, y.shape) == ((256, packed.in_features), (256, packed.shape[0]))
      True
    """
    if x.shape[-1] != w.in_features:
        raise SpqrError(f"x has {x.shape[-1]} features, but the weight of shape {w.shape} takes {w.in_features}")
    x = jnp.asarray(x)
    backend = choose(implementation, x.dtype)
    # A grid without programs cannot be launched.
    if x.size == 0:
        backend = XLA
    return _with_rules(x, w, backend) if backend.kernels else backend.matmul(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_rules(x: Float[Array, "*batch in"], w: SpqrTensor, backend: Backend) -> Float[Array, "*batch out"]:
    """The product, with rules to differentiate and to map it."""
    matmul = jax.custom_batching.custom_vmap(backend.matmul)

    @matmul.def_vmap
    def _(size: int, batched: Any, x: Array, w: SpqrTensor) -> tuple[Array, Literal[True]]:
        x_batched, w_batched = batched
        if not any(jax.tree.leaves(w_batched)):
            return matmul(x, w), True  # one more axis of tokens

        def broadcast(leaf: Array, is_batched: bool) -> Array:
            return leaf if is_batched else jnp.broadcast_to(leaf, (size, *leaf.shape))

        pairs = broadcast(x, x_batched), jax.tree.map(broadcast, w, w_batched)
        return jax.lax.map(lambda pair: matmul(*pair), pairs), True

    return matmul(x, w)


def _forward(x: Array, w: SpqrTensor, backend: Backend) -> tuple[Array, tuple[Array, SpqrTensor]]:
    return _with_rules(x, w, backend), (x, w)


def _backward(backend: Backend, residuals: tuple[Array, SpqrTensor], cotangent: Array) -> tuple[Array, SpqrTensor]:
    return jax.vjp(XLA.matmul, *residuals)[1](cotangent)


_with_rules.defvjp(_forward, _backward)
