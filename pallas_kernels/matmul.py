"""The product of activations with a packed weight."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import triton
from pallas_kernels.backends.devices import Implementation, choose
from pallas_kernels.dequantize import dequantize_in_order
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.regimes import MOST_TOKENS


def spqr_matmul(
    x: Float[Array, "*batch in"], w: SpqrTensor, *, implementation: Implementation | None = None
) -> Float[Array, "*batch out"]:
    """y = x ŵᵀ, accumulated in float32, in x's type.

    Can be jitted, mapped (over x, over stacks of w, or both) and differentiated. Where XLA multiplies float32, it does
    so in the precision of `jax.default_matmul_precision`: on a GPU in TF32, unless that says otherwise.

    Args:
      x: activations; the Pallas kernels take bfloat16, float16 and float32.
      w: the packed weight.
      implementation: `"pallas"` multiplies with the packed codes in one fused kernel (see `regimes` for which one),
        `"xla"` with the dequantized weight; `"interpret"` is the Pallas kernels run by XLA on any device, for tests.
        None is Pallas on a supported GPU, and XLA elsewhere.

    Raises:
      SpqrError: x's last axis is not w's number of input features, or the implementation cannot run here.

    Example:
      >>> y = spqr_matmul(x, packed)  # [..., in] -> [..., out]
    """
    if x.shape[-1] != w.in_features:
        raise SpqrError(f"x has {x.shape[-1]} features, but the weight of shape {w.shape} takes {w.in_features}")
    chosen = choose(implementation)
    if implementation is None and x.dtype.name not in MOST_TOKENS:
        chosen = "xla"
    # No kernel runs on nothing.
    if chosen == "xla" or x.size == 0:
        return _xla(x, w)
    return _pallas(x, w, chosen == "interpret")


def _xla(x: Float[Array, "*batch in"], w: SpqrTensor) -> Float[Array, "*batch out"]:
    """The permutation is applied to x, so the weight stays in quantization order."""
    if w.permutation is not None:
        x = x[..., w.permutation]
    weight = dequantize_in_order(w).astype(x.dtype)
    # Not an einsum: XLA for CPUs cannot run the product that it makes of permuted bfloat16.
    return jnp.matmul(x, weight.T, preferred_element_type=jnp.float32).astype(x.dtype)


# Jitted, so that the products of a model that are alike are traced and lowered once.
_kernels = jax.jit(triton.matmul, static_argnames="interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pallas(x: Float[Array, "*batch in"], w: SpqrTensor, interpret: bool) -> Float[Array, "*batch out"]:
    matmul = jax.custom_batching.custom_vmap(functools.partial(_kernels, interpret=interpret))

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


def _forward(x: Array, w: SpqrTensor, interpret: bool) -> tuple[Array, tuple[Array, SpqrTensor]]:
    return _pallas(x, w, interpret), (x, w)


def _backward(interpret: bool, residuals: tuple[Array, SpqrTensor], cotangent: Array) -> tuple[Array, SpqrTensor]:
    return jax.vjp(_xla, *residuals)[1](cotangent)


_pallas.defvjp(_forward, _backward)
