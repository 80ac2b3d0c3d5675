"""A quantized model in a few numbers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    outliers = sum(int(np.sum(tensor.outliers.count)) for tensor in packed if tensor.outliers is not None)
    return Summary(weights, 8 * size / max(weights, 1), outliers / max(weights, 1))


def summarize_described(header: Mapping[str, Any]) -> Summary:
    """The same of a checkpoint that is not loaded, from what `checkpoint.describe` says of it.

    Example:
      >>> summarize_described(describe("smollm2-spqr")).bits_per_weight
      4.23
    """
    matrices = header["matrices"].values()
    weights = sum(math.prod(matrix["shape"]) for matrix in matrices)
    size = sum(matrix["bytes"] for matrix in matrices)
    outliers = sum(matrix["outliers"] or 0 for matrix in matrices)
    return Summary(weights, 8 * size / max(weights, 1), outliers / max(weights, 1))
