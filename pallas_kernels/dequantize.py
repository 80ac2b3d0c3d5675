"""The dense weight of a packed matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.backends.backend import Backend
from pallas_kernels.backends.statistics import row_scales, row_zeros
from pallas_kernels.backends.table import Implementation, choose
from pallas_kernels.format.bit_layout import unpack_codes
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


def spqr_take(
    w: SpqrTensor, rows: Integer[Array | np.ndarray, "*batch"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch in"]:
    """Rows of ŵ, of which only these are unpacked: an embedding of tokens, one in each row.

    Args:
      w: the packed weight.
      rows: indices below `out`, which are not checked.
      dtype: of the result.

    Example:
      >>> rows = jnp.array([[3, 0], [3, 1]])
      >>> bool((spqr_take(packed, rows) == spqr_dequantize(packed)[rows]).all())
      True
    """
    return _take(w, jnp.asarray(rows), jnp.dtype(dtype))


@partial(jax.jit, static_argnames="dtype", inline=True)
def _take(w: SpqrTensor, rows: Integer[Array, "*batch"], dtype: DTypeLike) -> Float[Array, "*batch in"]:
    flat, (_, columns) = rows.reshape(-1).astype(jnp.int32), w.shape
    codes = unpack_codes(jnp.asarray(w.codes)[:, flat], columns).astype(jnp.float32)
    grouped = codes.reshape(len(flat), columns // w.group_size, w.group_size)
    weight = (row_scales(w, flat)[..., None] * (grouped - row_zeros(w, flat)[..., None])).reshape(len(flat), columns)
    if w.outliers is not None:
        weight = w.outliers.add_rows(weight, flat)
    if w.permutation is not None:
        weight = weight[:, jnp.argsort(jnp.asarray(w.permutation))]
    return weight.reshape(*rows.shape, columns).astype(dtype)


@partial(jax.jit, static_argnames=("backend", "dtype"), inline=True)
def _dequantize(w: SpqrTensor, backend: Backend, dtype: DTypeLike) -> Float[Array, "out in"]:
    # One program where a caller is not in one, and not one for each operation.
    return backend.dequantize(w, dtype)
