"""x ŵᵀ by the kernel for the number of tokens."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends.devices import device_kind
from pallas_kernels.backends.triton.dequantize import dequantize_matrix
from pallas_kernels.backends.triton.fma import fma_matmul
from pallas_kernels.backends.triton.mma import mma_matmul
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.measurements import best_tile
from pallas_kernels.tuning.regimes import regime
from pallas_kernels.tuning.tiles import Regime, Tile


def matmul(x: Float[Array, "*batch in"], w: SpqrTensor, *, interpret: bool) -> Float[Array, "*batch out"]:
    """y = x ŵᵀ, accumulated in float32, in x's type."""
    tokens, device = math.prod(x.shape[:-1]), device_kind()
    kernel = regime(tokens, x.dtype, device)
    y = MATMULS[kernel](
        x.reshape(tokens, w.in_features), w, tile=best_tile(kernel, w, tokens, device), interpret=interpret
    )
    return y.reshape(*x.shape[:-1], w.shape[0])


def dequantize_and_matmul(
    x: Float[Array, "tokens in"], w: SpqrTensor, *, tile: Tile, interpret: bool
) -> Float[Array, "tokens out"]:
    """y = x ŵᵀ by XLA, with the weight that the kernel writes."""
    # GPUs accumulate in float32 for any result type; asking for float32 results would add a pass to round them.
    return jnp.matmul(x, dequantize_matrix(w, x.dtype, tile=tile, interpret=interpret))


MATMULS: dict[Regime, Callable[..., Float[Array, "tokens out"]]] = {
    "fma": fma_matmul,
    "mma": mma_matmul,
    "dequantize": dequantize_and_matmul,
}
"""The product of each regime: takes x `[tokens, in]`, a packed matrix, `tile` and `interpret`."""
