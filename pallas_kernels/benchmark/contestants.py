"""The contestants in JAX: this library's product, its dense and sparse parts, and `jnp.dot` in bfloat16."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

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
    """A contestant that is compiled for one x.

    Attributes:
      product: x · weightᵀ.
      time: times the product.
    """

    product: Float[Array | np.ndarray, "tokens out"]
    time: Callable[[], Timing]


@dataclass(frozen=True)
class Contestant:
    """One implementation of the product with one matrix.

    Attributes:
      name: name in the results.
      format: format of the stored weights.
      nbytes: bytes of the stored weights.
      dtype: type of the activations.
      weight: the dense weight, in float32 or in the stored type.
      prepare: compiles for x and multiplies once, given an estimate of the seconds per call. Thread-safe.
      most_tokens: largest number of tokens to time.
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
    """The contestants that need only JAX, all for one random matrix.

    Args:
      form: format of the packed matrix.
      shape: (out, in).
      implementation: backend of `spqr_matmul`. None: the default of the device.

    Example:
      >>> form = Format.parse("3b-g16-s3-o1%")
      >>> [contestant.name for contestant in jax_contestants(form, (64, 256), None)]
      ['spqr_matmul', 'jnp.dot', 'dense part', 'sparse part']
    """
    packed = random_matrix(form, shape, 0)
    weight = exact_weight(packed)
    multiply = functools.partial(spqr_matmul, implementation=implementation)
    yield _contestant(SPQR, str(form), jnp.bfloat16, multiply, packed, weight)
    # [in, out], the layout in the layers of models.
    kernel = weight.T.astype(jnp.bfloat16)
    yield _contestant(BFLOAT16, "bfloat16", jnp.bfloat16, jnp.dot, kernel, kernel.T)
    if packed.outliers is not None:
        dense = replace(packed, outliers=None)
        dense_form = str(replace(form, outlier_percent=0.0))
        dense_weight = exact_weight(dense)
        yield _contestant(DENSE_PART, dense_form, jnp.bfloat16, multiply, dense, dense_weight)
        residuals = sparse_part(packed)
        # JAX calls NVIDIA's library for this product in float32 only.
        yield _contestant(
            SPARSE_PART, "BCSR float32", jnp.float32, lambda x, w: (w @ x.T).T, residuals, weight - dense_weight
        )


def exact_weight(packed: SpqrTensor) -> Float[Array, "out in"]:
    """ŵ in float32, computed by XLA and not by the kernels under test."""
    weight: Array = jax.jit(functools.partial(spqr_dequantize, implementation="xla"))(packed)
    return weight


def sparse_part(packed: SpqrTensor) -> sparse.BCSR:
    """The residuals of the outliers, with columns in the order of the input features.

    Example:
      >>> sparse_part(random_matrix(Format.parse("3b-g16-s3-o1%"), (64, 256), 0)).nse
      164
    """
    assert packed.outliers is not None
    outliers = packed.outliers
    columns = jnp.asarray(outliers.columns, jnp.int32)
    if packed.permutation is not None:
        columns = packed.permutation[columns].astype(jnp.int32)
    values = jnp.asarray(outliers.values, jnp.float32)
    return sparse.BCSR((values, columns, jnp.asarray(outliers.offsets)), shape=packed.shape, unique_indices=True)


def _contestant(
    name: str,
    form: str,
    dtype: DTypeLike,
    function: Callable[..., Array],
    w: PyTree[Array],
    weight: Float[Array, "out in"],
) -> Contestant:
    def prepare(x: Float[Array, "tokens in"], rough: float) -> Prepared:
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
