"""The product of activations with a packed weight."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequantize import dequantize_in_order
from pallas_kernels.tensor import SpqrTensor


def spqr_matmul(x: Float[Array, "*batch in"], w: SpqrTensor) -> Float[Array, "*batch out"]:
    """y = x ŵᵀ, accumulated in float32, in x's type.

    The permutation is applied to x, so the weight stays in quantization order.

    Raises:
      ValueError: x's last axis is not w's number of input features.

    Example:
      >>> y = spqr_matmul(x, packed)  # [..., in] -> [..., out]
    """
    if x.shape[-1] != w.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, but the weight of shape {w.shape} takes {w.in_features}")
    if w.permutation is not None:
        x = x[..., w.permutation]
    weight = dequantize_in_order(w).astype(x.dtype)
    # Not an einsum: XLA for CPUs cannot run the product that it makes of permuted bfloat16.
    return jnp.matmul(x, weight.T, preferred_element_type=jnp.float32).astype(x.dtype)
