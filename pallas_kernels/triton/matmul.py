"""x ŵᵀ by the kernel for so many tokens."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.regimes import regime
from pallas_kernels.tensor import SpqrTensor
from pallas_kernels.triton.dequantize import dequantize_matrix
from pallas_kernels.triton.fma import fma_matmul
from pallas_kernels.triton.mma import mma_matmul


def matmul(x: Float[Array, "*batch in"], w: SpqrTensor, *, interpret: bool) -> Float[Array, "*batch out"]:
    """y = x ŵᵀ, accumulated in float32, in x's type."""
    tokens, out = math.prod(x.shape[:-1]), w.shape[0]
    flat = x.reshape(tokens, w.in_features)
    match regime(tokens, x.dtype):
        case "fma":
            y = fma_matmul(flat, w, interpret=interpret)
        case "mma":
            y = mma_matmul(flat, w, interpret=interpret)
        case "dequantize":
            weight = dequantize_matrix(w, x.dtype, interpret=interpret)
            in_order = flat if w.permutation is None else flat[:, w.permutation]
            y = jnp.matmul(in_order, weight.T, preferred_element_type=jnp.float32).astype(x.dtype)
    return y.reshape(*x.shape[:-1], out)
