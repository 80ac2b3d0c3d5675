"""Who multiplies: this library, its two parts, and what a user could take instead."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.aot.formats import Format
from pallas_kernels.backends.table import Implementation
from pallas_kernels.benchmark.matrices import random_matrix
from pallas_kernels.benchmark.timing import Timing, compile_calls, measure
from pallas_kernels.dequantize import spqr_dequantize
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.matmul import spqr_matmul

SPQR, DENSE_PART, SPARSE_PART = "spqr_matmul", "dense part", "sparse part"
BFLOAT16 = "jnp.dot"


@dataclass(frozen=True)
class Prepared:
    """A contestant with activations x.

    Attributes:
      product: x · weightᵀ, `[tokens, out]`.
      time: measures how long that takes.
    """

    product: Any
    time: Callable[[], Timing]


@dataclass(frozen=True)
class Contestant:
    """One way to multiply with one matrix.

    Attributes:
      name: shown beside the results.
      format: what the weights are held in.
      nbytes: of the weights.
      dtype: of the activations.
      weight: what it multiplies with, dense, in float32 or in the type in which it is held.
      prepare: makes ready, and multiplies once, given x and about how many seconds that takes; several threads can have
        several contestants do so.
      most_tokens: more are not asked of it.
    """

    name: str
    format: str
    nbytes: int
    dtype: DTypeLike
    weight: Float[Array, "out in"]
    prepare: Callable[[Float[Array, "tokens in"], float], Prepared]
    most_tokens: int = 1 << 30


def jax_contestants(
    form: Format, shape: tuple[int, int], implementation: Implementation | None
) -> Iterator[Contestant]:
    """Those that are always there, all of the same random matrix.

    Args:
      form: what the matrix is packed as.
      shape: (out, in).
      implementation: of `spqr_matmul`.
    """
    packed = random_matrix(form, shape, 0)
    weight = exact_weight(packed)
    multiply = functools.partial(spqr_matmul, implementation=implementation)
    yield _contestant(SPQR, str(form), jnp.bfloat16, multiply, packed, weight)
    # As the layers of models have it: [in, out].
    kernel = weight.T.astype(jnp.bfloat16)
    yield _contestant(BFLOAT16, "bfloat16", jnp.bfloat16, jnp.dot, kernel, kernel.T)
    if packed.outliers is not None:
        dense = replace(packed, outliers=None)
        dense_form = str(replace(form, outlier_percent=0))
        dense_weight = exact_weight(dense)
        yield _contestant(DENSE_PART, dense_form, jnp.bfloat16, multiply, dense, dense_weight)
        residuals = sparse_part(packed)
        # JAX has a library do this in float32 only.
        yield _contestant(
            SPARSE_PART, "BCSR float32", jnp.float32, lambda x, w: (w @ x.T).T, residuals, weight - dense_weight
        )


def exact_weight(packed: SpqrTensor) -> Float[Array, "out in"]:
    """ŵ in float32, found without the kernels that are measured."""
    return jax.jit(functools.partial(spqr_dequantize, implementation="xla"))(packed)


def sparse_part(packed: SpqrTensor) -> sparse.BCSR:
    """The residuals of the outliers, columns in the order of the input features."""
    assert packed.outliers is not None
    outliers = packed.outliers
    columns = jnp.asarray(outliers.columns, jnp.int32)
    if packed.permutation is not None:
        columns = packed.permutation[columns].astype(jnp.int32)
    values = jnp.asarray(outliers.values, jnp.float32)
    return sparse.BCSR((values, columns, jnp.asarray(outliers.offsets)), shape=packed.shape, unique_indices=True)


def _contestant(
    name: str, form: str, dtype: DTypeLike, function: Callable[..., Array], w: Any, weight: Array
) -> Contestant:
    def prepare(x: Array, rough: float) -> Prepared:
        calls = compile_calls(function, x, w, rough)
        return Prepared(calls.program(x, [w] * calls.copies)[-1], lambda: measure(calls, x, w))

    return Contestant(
        name=name,
        format=form,
        nbytes=sum(leaf.nbytes for leaf in jax.tree.leaves(w)),
        dtype=dtype,
        weight=weight,
        prepare=prepare,
    )
