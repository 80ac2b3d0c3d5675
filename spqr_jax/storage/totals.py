"""Size and outliers of a whole quantized model."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from pallas_kernels import SpqrTensor
from spqr_jax.models.ending import ENDS
from spqr_jax.storage.description import ArrayEntry, Entries, MatrixEntry


class Summary(NamedTuple):
    """Totals over the packed matrices of a model's blocks, and over all of its parameters.

    Attributes:
      weights: number of weights in packed matrices of blocks: all but embedding and head.
      bits_per_weight: 8 · bytes of those matrices / weights.
      outlier_share: outliers / weights.
      parameters: number of all parameters, with the rows of zeros that fill the groups of a packed table.
      nbytes: bytes of all parameters.
    """

    weights: int
    bits_per_weight: float
    outlier_share: float
    parameters: int
    nbytes: int

    @property
    def bits_per_parameter(self) -> float:
        """8 · bytes / number, of all parameters of the model."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def sizes(self) -> dict[str, float]:
        """The totals by the names that they have in results of commands and in records."""
        packed = {"bits_per_weight": self.bits_per_weight, "outlier_share": self.outlier_share} if self.weights else {}
        whole = {"bits_per_parameter": self.bits_per_parameter, "bytes_of_parameters": self.nbytes}
        return {**packed, "parameters": self.parameters, **whole}

    def sizes_with_files(self, nbytes: int) -> dict[str, float]:
        """`sizes`, and those of the files that hold the model: compressed arrays, tokenizer and descriptions."""
        on_disk = {"bytes_on_disk": nbytes, "bits_per_parameter_on_disk": 8 * nbytes / max(self.parameters, 1)}
        return {**self.sizes(), **on_disk}


def summarize(params: PyTree) -> Summary:
    """Sums over a parameter tree, its `SpqrTensor`s stacked or not.

    Example:
      >>> summarize(quantized)
      Summary(weights=73728, bits_per_weight=..., outlier_share=..., parameters=..., nbytes=...)
    """
    packed: list[SpqrTensor] = []
    others: list[Any] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor)):
        in_block = isinstance(leaf, SpqrTensor) and not is_end(jax.tree_util.keystr(path, simple=True, separator="."))
        (packed if in_block else others).append(leaf)
    outliers = sum(int(np.sum(tensor.outliers.count)) for tensor in packed if tensor.outliers is not None)
    return _summary(_size(packed), _size(others), outliers)


def summarize_described(description: Entries) -> Summary:
    """Sums over the packed matrices of a checkpoint that is not loaded, from its description.

    Example:
      >>> from spqr_jax.storage.checkpoint import describe
      >>> summarize_described(describe("tiny-spqr")) == summarize(quantized)
      True
    """
    packed = [entry for name, entry in description["matrices"].items() if not is_end(name)]
    ends = [entry for name, entry in description["matrices"].items() if is_end(name)]
    outliers = sum(matrix["outliers"] or 0 for matrix in packed)
    return _summary(_size_of(packed), _size_of([*ends, *description["dense"].values()]), outliers)


def is_end(name: str) -> bool:
    """Whether an array, by its path, is of the embedding or the head.

    Example:
      >>> is_end("embed_tokens.embedding"), is_end("layers_0.q_proj.kernel")
      (True, False)
    """
    return name.partition(".")[0] in ENDS


def _size_of(entries: Sequence[MatrixEntry | ArrayEntry]) -> tuple[int, int]:
    """Number of elements, and of bytes."""
    return sum(math.prod(entry["shape"]) for entry in entries), sum(entry["bytes"] for entry in entries)


def _size(leaves: Iterable[Any]) -> tuple[int, int]:
    """Number of elements, and of bytes."""
    sizes = [(leaf.size, leaf.nbytes) for leaf in leaves]
    return sum(size for size, _ in sizes), sum(nbytes for _, nbytes in sizes)


def _summary(packed: tuple[int, int], dense: tuple[int, int], outliers: int) -> Summary:
    (weights, size), (others, other_size) = packed, dense
    return Summary(weights, 8 * size / max(weights, 1), outliers / max(weights, 1), weights + others, size + other_size)
