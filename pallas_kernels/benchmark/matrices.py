"""Random packed matrices, generated directly in the packed format on the device, without quantizing."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt16, UInt32

from pallas_kernels.aot.formats import Format
from pallas_kernels.format.bit_layout import pack_codes
from pallas_kernels.format.outliers import Outliers
from pallas_kernels.format.tensor import SpqrTensor

WEIGHT = 0.03
"""Approximate standard deviation of the weights."""
RESIDUAL = 0.1
"""Standard deviation of the residuals of outliers."""


def random_matrix(form: Format, shape: tuple[int, int], seed: int | Array) -> SpqrTensor:
    """A random matrix in a packed format on JAX's default device.

    The number of outliers per row is binomially distributed. The total is fixed, so matrices of one format and shape
    can be stacked.

    Args:
      form: format of the packed matrix.
      shape: (out, in).
      seed: equal seeds give equal matrices on devices of one kind.

    Raises:
      SpqrError: the format does not support these sizes.

    Example:
      >>> random_matrix(Format.parse("3b-g16-s3-o1%"), (64, 256), seed=0).outliers.capacity
      164
    """
    return _random_matrix(form, shape, seed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_matrix(form: Format, shape: tuple[int, int], seed: int | Array) -> SpqrTensor:
    like = form.tensor(shape)
    # The "rbg" keys use the device's own generator, which takes a fraction of threefry's time.
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


def _bits(key: Array, like: Array | np.ndarray | jax.ShapeDtypeStruct) -> Array:
    return jax.random.bits(key, like.shape, like.dtype)


def _statistics(name: str, like: SpqrTensor, low: float, high: float, keys: Iterator[Array]) -> dict[str, Any]:
    """The fields of the scales, or of the zeros, with values about uniform between low and high."""

    def uniform(like: Array | np.ndarray | jax.ShapeDtypeStruct, low: float, high: float) -> Array:
        return jax.random.uniform(next(keys), like.shape, minval=low, maxval=high).astype(like.dtype)

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
    """Random outliers: each is in a random row, and the outliers of a row divide its columns evenly among them."""
    if like.outliers is None:
        return None
    (out, columns), count = like.shape, like.outliers.capacity
    per_row = jnp.bincount(jax.random.randint(next(keys), (count,), 0, out), length=out)
    # Only small matrices can draw more outliers than columns for a row. The excess becomes padding.
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


def _columns(
    key: Array, number: UInt32[Array, " nnz"], of: UInt32[Array, " nnz"], columns: int
) -> UInt16[Array, " nnz"]:
    """Random columns: outlier `number` of the `of` outliers in a row draws from part `number` of `of` equal parts."""
    first = number * columns // of
    width: Int[Array, " nnz"] = (number + 1) * columns // of - first
    return (first + jax.random.bits(key, number.shape, jnp.uint32) % width).astype(jnp.uint16)
