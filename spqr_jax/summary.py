"""A quantized model in a few numbers."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from pallas_kernels import SpqrTensor


class Summary(NamedTuple):
    """Totals over the packed matrices of a model.

    Attributes:
      weights: number of weights in packed matrices.
      bits_per_weight: 8 · bytes of those matrices / weights.
      outlier_share: outliers / weights.
    """

    weights: int
    bits_per_weight: float
    outlier_share: float


def summarize(params: PyTree) -> Summary:
    """Totals over all `SpqrTensor`s of a parameter tree, stacks of them too; bits and share are 0 where there are none.

    Example:
      >>> summarize(quantized).bits_per_weight
      4.26
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))
    packed = [leaf for leaf in leaves if isinstance(leaf, SpqrTensor)]
    weights = sum(math.prod((*tensor.codes.shape[:-3], *tensor.shape)) for tensor in packed)
    size = sum(tensor.nbytes for tensor in packed)
    offsets = [np.asarray(tensor.row_offsets) for tensor in packed if tensor.row_offsets is not None]
    outliers = sum(int(per_row[..., -1].sum()) for per_row in offsets)
    return Summary(weights, 8 * size / max(weights, 1), outliers / max(weights, 1))
