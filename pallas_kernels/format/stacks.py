"""Packed matrices of one format as one pytree with a leading axis, to be scanned over or spread over devices."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor, trim


def stack(tensors: Sequence[SpqrTensor]) -> SpqrTensor:
    """Gives every array a leading axis, one element per matrix.

    The numbers of outliers may differ: they are padded with zeros, which add nothing to a product, to the largest.

    Args:
      tensors: matrices of the same shape and format. They must be concrete: the padding cannot be traced.

    Raises:
      SpqrError: the matrices differ in shape or format.

    Example:
      >>> blocks = stack([pack_block(i) for i in range(30)])
      >>> _, y = jax.lax.scan(lambda x, w: (spqr_matmul(x, w), None), x, blocks)
    """
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *pad(tensors))


def pad(tensors: Sequence[SpqrTensor]) -> list[SpqrTensor]:
    """Gives every matrix room for the same number of outliers, as `stack` does, without stacking them.

    What is compiled for one of them then serves all.

    Raises:
      SpqrError: the matrices differ in format.

    Example:
      >>> {tensor.outliers.capacity for tensor in pad(tensors)}
      {451723}
    """
    if len({jax.tree.structure(tensor) for tensor in tensors}) > 1:
        raise SpqrError("matrices of different formats cannot be stacked")
    capacity = max((tensor.outliers.capacity for tensor in tensors if tensor.outliers is not None), default=0)
    return [
        tensor
        if tensor.outliers is None or tensor.outliers.capacity == capacity
        else replace(tensor, outliers=tensor.outliers.pad(capacity))
        for tensor in tensors
    ]


def element(stacked: SpqrTensor, index: int) -> SpqrTensor:
    """One matrix of a stack, without the padding of its outliers.

    Example:
      >>> element(stack(tensors), 2)  # tensors[2]
    """
    return trim(jax.tree.map(lambda array: array[index], stacked))
