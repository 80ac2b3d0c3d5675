"""Splitting of packed matrices by columns, for tensor parallelism."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt16, UInt32

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.bit_layout import pack_codes, unpack_codes
from pallas_kernels.format.outliers import Outliers
from pallas_kernels.format.rows import ROW_FIELDS
from pallas_kernels.format.stacks import stack
from pallas_kernels.format.tensor import SpqrTensor


def split_columns(
    tensor: SpqrTensor, parts: int
) -> tuple[SpqrTensor, UInt16[Array | np.ndarray, "parts part_columns"] | None]:
    """Cuts a packed matrix into `parts` of equally many columns, stacked, one for each device.

    A part has consecutive columns of the quantization order, so that groups stay whole. Every array gets a leading axis
    of `parts`. The outliers of each part are padded with zeros to the largest number of any part. The parts have no
    permutation of their own.

    Args:
      tensor: a concrete matrix `[out, in]`.
      parts: number of parts.

    Returns:
      A stack of matrices `[out, in / parts]`, and the input features that each multiplies. None instead of features
      where these are in order: the first `in / parts` for the first part.

    Raises:
      SpqrError: a part would not have whole groups, or the tensor is a stack already.

    Example:
      >>> w, x = quantized["layers_0"]["down_proj"]["kernel"], jnp.ones((4, 128))
      >>> split, features = split_columns(w, 2)
      >>> y = sum(spqr_matmul(x[..., features[i]], jax.tree.map(lambda array: array[i], split)) for i in range(2))
      >>> bool(jnp.allclose(y, spqr_matmul(x, w), atol=1e-4))
      True
    """
    if tensor.stack:
        raise SpqrError(f"a stack of {len(tensor.codes)} matrices cannot be split by columns; split each of them")
    columns = tensor.in_features
    if parts < 1 or columns % (parts * tensor.group_size):
        raise SpqrError(
            f"{columns} input features do not divide into {parts} parts of whole groups of {tensor.group_size}"
        )
    statistics = {
        name: jnp.split(array, parts, axis=-1)
        for name in ROW_FIELDS
        if name != "codes" and (array := getattr(tensor, name)) is not None
    }
    pieces = {"codes": _split_codes(tensor.codes, columns, parts), **statistics}
    whole = replace(tensor, permutation=None, in_features=columns // parts)
    outliers: list[Outliers | None] = [None] * parts
    if tensor.outliers is not None:
        outliers = [*tensor.outliers.split_columns(columns // parts, parts)]
    split = [
        replace(whole, **{name: pieces[name][index] for name in pieces}, outliers=outliers[index])
        for index in range(parts)
    ]
    return stack(split), None if tensor.permutation is None else tensor.permutation.reshape(parts, -1)


@partial(jax.jit, static_argnames=("columns", "parts"))
def _split_codes(words: UInt32[Array | np.ndarray, "bits out half_blocks"], columns: int, parts: int) -> list[Array]:
    """Unpacks and packs again, because a word holds codes half a row apart and a part may begin within a block."""
    return [pack_codes(part, len(words)) for part in jnp.split(unpack_codes(words, columns), parts, axis=1)]
