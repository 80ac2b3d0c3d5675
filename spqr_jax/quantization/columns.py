"""Solving the columns of a weight, group by group.

Source: Dettmers et al. 2023 (arXiv 2306.03078), Algorithm 1; Frantar et al. 2022 (GPTQ) for the error correction.
Inside, a weight is kept transposed, `[in, out]`: a column is then contiguous in memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from pallas_kernels.format.tensor import Statistics
from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.group_fit import decode, encode, fit_group

BLOCK_COLUMNS = 128
"""Columns after which errors are carried to the rest of the matrix."""


class Solution(NamedTuple):
    """A solved matrix in quantization order: ŵ = scale · (code − zero), plus the residual at an outlier.

    Attributes:
      outliers: which weights are outliers, and the residuals w − scale · (code − zero), w being the weight with all
        earlier columns' corrections; None without a threshold.
    """

    codes: UInt8[Array, "out in"]
    scale: Statistics
    zero: Statistics
    outliers: tuple[Bool[Array, "out in"], Float[Array, "out in"]] | None


def solve(
    weight: Float[Array, "out in"],
    inverse_factor: Float[Array, "in in"],
    threshold: Float[Array, " out"] | None,
    config: SpqrConfig,
) -> Solution:
    """Quantizes a weight column by column; later columns are corrected for each column's error.

    Args:
      weight: in quantization order, float32.
      inverse_factor: U of `factorize`.
      threshold: T of each row, negative for a row that is kept whole; None for no outliers. Rows of several matrices
        can be solved together.
    """
    out, columns = weight.shape
    size = config.group_size
    block = max(n for n in range(size, max(size, BLOCK_COLUMNS) + 1, size) if columns % n == 0)

    def solve_group(rest: Array, start: Array, u: Array) -> tuple[Array, tuple]:
        """Solves one group of a block; returns the block with later columns corrected, and the group's results."""
        group = jax.lax.dynamic_slice_in_dim(rest, start, size)
        factor_rows = jax.lax.dynamic_slice_in_dim(u, start, size)
        own = jax.lax.dynamic_slice_in_dim(factor_rows, start, size, axis=1)
        scale, zero, statistics = fit_group(group, jnp.diag(own), threshold, config)
        codes, outliers, errors = _quantize_columns(group, own, scale, zero, threshold, config)
        rest = rest - jnp.matmul(factor_rows.T, errors, precision="highest")
        return rest, (codes, outliers, errors, statistics)

    def solve_block(weight: Array, start: Array) -> tuple[Array, tuple]:
        u = jax.lax.dynamic_slice_in_dim(inverse_factor, start, block)
        here = jax.lax.dynamic_slice_in_dim(u, start, block, axis=1)
        rest = jax.lax.dynamic_slice_in_dim(weight, start, block)
        _, results = jax.lax.scan(lambda rest, s: solve_group(rest, s, here), rest, jnp.arange(0, block, size))
        codes, outliers, errors, statistics = results
        weight = weight - jnp.matmul(u.T, errors.reshape(block, out), precision="highest")
        return weight, (codes, outliers, statistics)

    _, results = jax.lax.scan(solve_block, weight.T, jnp.arange(0, columns, block))
    codes, outliers, (scale, zero) = results

    def by_row(values: Array) -> Array:
        return values.reshape(-1, values.shape[-1]).T

    return Solution(*jax.tree.map(by_row, (codes, scale, zero, outliers)))


def _quantize_columns(
    group: Float[Array, "group out"],
    factor: Float[Array, "group group"],
    scale: Float[Array, " out"],
    zero: Float[Array, " out"],
    threshold: Float[Array, " out"] | None,
    config: SpqrConfig,
) -> tuple[Array, tuple[Array, Array] | None, Array]:
    """Codes, outliers with residuals, and errors e = (w − ŵ) / U_jj of a group, column by column."""

    def step(group: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple]:
        index, factor_row = inputs
        column = jax.lax.dynamic_index_in_dim(group, index, keepdims=False)
        code = encode(column, scale, zero, config.bits)
        error = (column - decode(code, scale, zero)) / factor_row[index]
        outliers = None
        if threshold is not None:
            is_outlier = jnp.square(error) > threshold
            code = jnp.where(is_outlier, encode(jnp.zeros_like(column), scale, zero, config.bits), code)
            outliers = is_outlier, column - decode(code, scale, zero)
            error = jnp.where(is_outlier, 0, error)
        later = jnp.arange(config.group_size) > index
        group = group - jnp.where(later, factor_row, 0)[:, None] * error
        return group, (code.astype(jnp.uint8), outliers, error)

    _, results = jax.lax.scan(step, group, (jnp.arange(config.group_size), factor))
    return results
