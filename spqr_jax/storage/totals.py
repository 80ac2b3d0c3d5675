"""Size and outliers of a whole quantized model."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from pallas_kernels import SpqrTensor
from spqr_jax.storage.description import Entries


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
    """Sums over all `SpqrTensor`s of a parameter tree, stacked ones too; without any, all totals are 0.

    Example:
      >>> summarize(quantized)
      Summary(weights=73728, bits_per_weight=..., outlier_share=...)
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))
    packed = [leaf for leaf in leaves if isinstance(leaf, SpqrTensor)]
    weights = sum(tensor.size for tensor in packed)
    size = sum(tensor.nbytes for tensor in packed)
    outliers = sum(int(np.sum(tensor.outliers.count)) for tensor in packed if tensor.outliers is not None)
    return Summary(weights, 8 * size / max(weights, 1), outliers / max(weights, 1))


def summarize_described(description: Entries) -> Summary:
    """Sums over the packed matrices of a checkpoint that is not loaded, from its description.

    Example:
      >>> from spqr_jax.storage.checkpoint import describe
      >>> summarize_described(describe("tiny-spqr")) == summarize(quantized)
      True
    """
    matrices = description["matrices"].values()
    weights = sum(math.prod(matrix["shape"]) for matrix in matrices)
    size = sum(matrix["bytes"] for matrix in matrices)
    outliers = sum(matrix["outliers"] or 0 for matrix in matrices)
    return Summary(weights, 8 * size / max(weights, 1), outliers / max(weights, 1))
