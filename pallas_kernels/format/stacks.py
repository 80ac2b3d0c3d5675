"""Packed matrices of one format as one pytree with a leading axis, for scans and for meshes of devices."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import SpqrTensor, trim


def stack(tensors: Sequence[SpqrTensor]) -> SpqrTensor:
    """Gives every array a leading axis, one element per matrix.

    Outliers are padded with zeros, which add nothing to a product, to the largest number of any matrix.

    Args:
      tensors: concrete matrices of the same shape and format.

    Raises:
      SpqrError: the matrices differ in shape or format.

    Example:
      >>> y, _ = jax.lax.scan(lambda x, w: (spqr_matmul(x, w), None), x, stack([packed, packed]))
      >>> y.shape
      (256, 64)
    """
    return jax.tree.map(stack_arrays, *pad(tensors))


def stack_arrays(*arrays: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array | np.ndarray, "stack ..."]:
    """Gives arrays a leading axis. Those in host memory stay there.

    Example:
      >>> stack_arrays(np.zeros(3), np.ones(3)).shape
      (2, 3)
    """
    host = all(isinstance(array, np.ndarray) for array in arrays)
    return np.stack(arrays) if host else jnp.stack(arrays)


def pad(tensors: Sequence[SpqrTensor]) -> list[SpqrTensor]:
    """Gives every matrix room for the same number of outliers, as `stack` does, without stacking them.

    A program that is compiled for one of them then serves all.

    Raises:
      SpqrError: the matrices differ in shape or format.

    Example:
      >>> larger = replace(packed, outliers=packed.outliers.pad(packed.outliers.capacity + 9))
      >>> len({tensor.outliers.capacity for tensor in pad([packed, larger])})
      1
    """
    if len(set(map(form, tensors))) > 1:
        raise SpqrError("matrices of different shapes or formats cannot be stacked")
    capacity = max((tensor.outliers.capacity for tensor in tensors if tensor.outliers is not None), default=0)
    return [
        tensor
        if tensor.outliers is None or tensor.outliers.capacity == capacity
        else replace(tensor, outliers=tensor.outliers.pad(capacity))
        for tensor in tensors
    ]


def pad_alike(tensors: Sequence[SpqrTensor]) -> list[SpqrTensor]:
    """Pads matrices as `pad` does, those of each form by themselves; matrices of several forms stay in their order."""
    places: dict[Hashable, list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault(form(tensor), []).append(index)
    padded: dict[int, SpqrTensor] = {}
    for indices in places.values():
        padded |= dict(zip(indices, pad([tensors[index] for index in indices]), strict=True))
    return [padded[index] for index in range(len(tensors))]


def form(tensor: SpqrTensor) -> Hashable:
    """Shapes and format of a matrix without its number of outliers: only matrices that share them can be stacked.

    Example:
      >>> form(packed) == form(stack([packed, packed]))
      False
    """
    shapes = tuple((name, a.shape, a.dtype.name) for name, a in replace(tensor, outliers=None).arrays().items())
    return shapes, tensor.in_features, tensor.group_size, tensor.outliers is None


def element(stacked: SpqrTensor, index: int) -> SpqrTensor:
    """One matrix of a stack, without the padding of its outliers.

    Example:
      >>> bool((element(stack([packed, packed]), 1).codes == packed.codes).all())
      True
    """
    return trim(jax.tree.map(lambda array: array[index], stacked))
