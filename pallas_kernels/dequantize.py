"""The dense weight of a packed matrix."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends.backend import Backend
from pallas_kernels.backends.table import Implementation, choose
from pallas_kernels.format.tensor import SpqrTensor


def spqr_dequantize(
    w: SpqrTensor, dtype: DTypeLike = jnp.float32, *, implementation: Implementation | None = None
) -> Float[Array, "out in"]:
    """ŵ = scale · (code − zero) + outlier residual, columns in the order of the input features.

    Args:
      w: the packed weight.
      dtype: of the result.
      implementation: name of a backend, as for `spqr_matmul`.

    Raises:
      SpqrError: the backend is unknown or cannot run here.

    Example:
      >>> spqr_dequantize(packed, jnp.bfloat16)
      Array([[...]], dtype=bfloat16)
    """
    return _dequantize(w, choose(implementation), jnp.dtype(dtype))


@partial(jax.jit, static_argnames=("backend", "dtype"), inline=True)
def _dequantize(w: SpqrTensor, backend: Backend, dtype: DTypeLike) -> Float[Array, "out in"]:
    # One program where a caller is not in one, and not one for each operation.
    return backend.dequantize(w, dtype)
