"""The backend for every device: the weight is dequantized, and XLA multiplies."""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends.backend import Backend
from pallas_kernels.backends.one_row import one_row_product
from pallas_kernels.backends.statistics import scales, zeros
from pallas_kernels.format.bit_layout import unpack_codes
from pallas_kernels.format.tensor import SpqrTensor


def matmul(x: Float[Array | np.ndarray, "*batch in"], w: SpqrTensor) -> Float[Array, "*batch out"]:
    """y = x ŵᵀ, accumulated in float32, in x's type."""
    # Permuting x instead of the weight moves `in` numbers for each token, and not `out · in`.
    if w.permutation is not None:
        x = x[..., w.permutation]
    if math.prod(x.shape[:-1]) == 1:
        return one_row_product(jnp.asarray(x).reshape(-1), w).reshape(*x.shape[:-1], -1).astype(x.dtype)
    weight = dequantize_in_order(w).astype(x.dtype)
    # Not an einsum: XLA for CPUs cannot run the product that it makes of permuted bfloat16.
    return jnp.matmul(x, weight.T, preferred_element_type=jnp.float32).astype(x.dtype)


def dequantize(w: SpqrTensor, dtype: DTypeLike) -> Float[Array, "out in"]:
    """ŵ in a type, columns in the order of the input features."""
    weight = dequantize_in_order(w).astype(dtype)
    return weight if w.permutation is None else weight[:, jnp.argsort(w.permutation)]


XLA = Backend(name="xla", needs="nothing", available=lambda: True, matmul=matmul, dequantize=dequantize)


def dequantize_in_order(tensor: SpqrTensor) -> Float[Array, "out in"]:
    """ŵ in float32, columns in quantization order."""
    out, columns = tensor.shape
    codes = unpack_codes(tensor.codes, columns).astype(jnp.float32)
    grouped = codes.reshape(out, -1, tensor.group_size)
    weight = scales(tensor)[..., None] * (grouped - zeros(tensor)[..., None])
    weight = weight.reshape(out, columns)
    if (outliers := tensor.outliers) is None:
        return weight
    # Each place has one residual, so adding is safe. The padding adds zeros.
    return weight.at[outliers.rows(), outliers.columns].add(outliers.values.astype(jnp.float32))
