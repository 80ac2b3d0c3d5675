"""The table of token embeddings, dense or packed: the lookup of its rows, and its product as a tied head."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels import SplitTensor, SpqrTensor, split_take, spqr_take
from spqr_jax.models.layers import linear, parameter
from spqr_jax.models.row_major import RowMajor

Table = Float[Array | np.ndarray, "vocabulary features"] | RowMajor | SpqrTensor | SplitTensor
"""A row for each token: dense, unpacked for a CPU, packed, or packed and split over devices."""


class Embedding(nn.Module):
    """A table with a row of `features` numbers for each token of a vocabulary."""

    vocab_size: int
    features: int

    def setup(self) -> None:
        shape = self.vocab_size, self.features
        self.embedding: Table = parameter(self, "embedding", nn.linear.default_embed_init, shape)


def look_up(
    table: Table, tokens: Integer[Array | np.ndarray, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch features"]:
    """Rows of a table in a type; of a packed one, only these rows are unpacked."""
    if isinstance(table, SplitTensor):
        return split_take(table, tokens, dtype)
    if isinstance(table, SpqrTensor):
        return spqr_take(table, tokens, dtype)
    if isinstance(table, RowMajor):
        return (jnp.take(table.weight, tokens, axis=0).astype(jnp.float32) / table.divisor).astype(dtype)
    # Converted after the lookup: XLA would convert the whole table.
    return jnp.take(table, tokens, axis=0).astype(dtype)


def tied_logits(x: Float[Array, "*batch features"], table: Table) -> Float[Array, "*batch vocabulary"]:
    """y = x tableᵀ, in x's type."""
    if isinstance(table, RowMajor | SpqrTensor | SplitTensor):
        return linear(x, table)
    return x @ jnp.asarray(table).astype(x.dtype).T
