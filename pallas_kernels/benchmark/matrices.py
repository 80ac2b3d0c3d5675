"""Packed matrices with random content, made where they are needed: nothing is quantized, and nothing packed."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt16

from pallas_kernels.aot.formats import Format
from pallas_kernels.format.bit_layout import pack_codes
from pallas_kernels.format.outliers import Outliers
from pallas_kernels.format.tensor import SpqrTensor

WEIGHT = 0.03
"""Standard deviation of the weights, about."""
RESIDUAL = 0.1
"""The same of the residuals of outliers."""


def random_matrix(form: Format, shape: tuple[int, int], seed: int | Array) -> SpqrTensor:
    """A matrix of this format on JAX's device; all matrices of one format and shape can be stacked.

    The numbers of outliers of its rows are uneven (binomially distributed), those of whole matrices equal.

    Args:
      form: what the matrix is packed as.
      shape: (out, in).
      seed: equal ones give equal matrices on devices of one kind.

    Raises:
      SpqrError: the format does not support these sizes; the message says which.

    Example:
      >>> random_matrix(Format.parse("3b-g16-s3-o1%"), (4096, 11008), seed=0).outliers.capacity
      450888
    """
    return _random_matrix(form, shape, seed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_matrix(form: Format, shape: tuple[int, int], seed: int | Array) -> SpqrTensor:
    like = form.tensor(shape)
    # What such keys give comes from the device's own generator, in a fraction of the time.
    keys = map(functools.partial(jax.random.fold_in, jax.random.key(seed, impl="rbg")), itertools.count())
    columns, steps = shape[1], 2**form.bits
    present = pack_codes(jnp.full((1, columns), steps - 1, jnp.uint8), form.bits)
    scale = WEIGHT * 12**0.5 / steps
    return replace(
        like,
        codes=_bits(next(keys), like.codes) & present,
        **_statistics("scale", like, scale / 2, 3 * scale / 2, keys),
        **_statistics("zero", like, steps / 4, 3 * steps / 4, keys),
        outliers=_outliers(like, keys),
        permutation=jax.random.permutation(next(keys), columns).astype(jnp.uint16),
    )


def _bits(key: Array, like: Any) -> Array:
    return jax.random.bits(key, like.shape, like.dtype)


def _statistics(name: str, like: SpqrTensor, low: float, high: float, keys: Iterator[Array]) -> dict[str, Any]:
    """The fields of one statistic, whose values lie about evenly between low and high."""

    def uniform(form: Any, low: float, high: float) -> Array:
        return jax.random.uniform(next(keys), form.shape, minval=low, maxval=high).astype(form.dtype)

    if (plain := getattr(like, name)) is not None:
        return {name: uniform(plain, low, high)}
    planes, second = getattr(like, f"{name}_codes"), getattr(like, f"{name}_scale")
    step = (high - low) / 2 ** planes.shape[0]
    return {
        f"{name}_codes": _bits(next(keys), planes),
        f"{name}_scale": uniform(second, 0.8 * step, 1.2 * step),
        f"{name}_zero": uniform(second, -1.2 * low / step, -0.8 * low / step),
    }


def _outliers(like: SpqrTensor, keys: Iterator[Array]) -> Outliers | None:
    """Outliers in CSR form: each is in a random row, and they share out the columns of theirs."""
    if like.outliers is None:
        return None
    (out, columns), count = like.shape, like.outliers.capacity
    per_row = jnp.bincount(jax.random.randint(next(keys), (count,), 0, out), length=out)
    # More outliers than columns are possible in small matrices only; what is cut off there is padding.
    per_row = jnp.minimum(per_row, columns).astype(jnp.uint32)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.uint32), jnp.cumsum(per_row, dtype=jnp.uint32)])
    place = jnp.arange(count, dtype=jnp.uint32)
    row = jnp.minimum(jnp.searchsorted(offsets, place, side="right") - 1, out - 1)
    values = jnp.where(place < offsets[-1], RESIDUAL * jax.random.normal(next(keys), (count,)), 0)
    return Outliers(
        offsets=offsets.astype(jnp.int32),
        columns=_columns(next(keys), place - offsets[row], per_row[row], columns),
        values=values.astype(jnp.float16),
    )


def _columns(key: Array, number: Array, of: Array, columns: int) -> UInt16[Array, " nnz"]:
    """A random column for outlier `number` of the `of` in its row, from its own stretch of the row."""
    first = number * columns // of
    width: Int[Array, " nnz"] = (number + 1) * columns // of - first
    return (first + jax.random.bits(key, number.shape, jnp.uint32) % width).astype(jnp.uint16)
