"""From a solution to a packed matrix, and to the dense weight that it stands for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import QuantizedStatistics, SpqrTensor, pack
from pallas_kernels.format.tensor import Statistics
from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.columns import Solution
from spqr_jax.quantization.factorize import Factor
from spqr_jax.quantization.group_fit import decode, rounded


def rows_of(solution: Solution, start: int, stop: int) -> Solution:
    """The solution of output rows `start` to `stop`, which are whole statistics groups."""
    out = solution.codes.shape[0]
    return jax.tree.map(lambda a: a[start * len(a) // out : stop * len(a) // out], solution)


def dense_weight(solution: Solution, factor: Factor, config: SpqrConfig) -> Float[Array, "out in"]:
    """The dequantized weight of a solution, columns in the order of the input features."""
    scale, zero = (jnp.repeat(_values(s), config.group_size, axis=1) for s in (solution.scale, solution.zero))
    weight = decode(solution.codes, scale, zero)
    if solution.outliers is not None:
        is_outlier, residual = solution.outliers
        weight += jnp.where(is_outlier, rounded(residual, jnp.float16), 0)
    return weight if factor.permutation is None else weight.T[jnp.argsort(factor.permutation)].T


def _values(statistics: Statistics) -> Float[Array, "out groups"]:
    if not isinstance(statistics, QuantizedStatistics):
        return statistics
    rows = len(statistics.codes) // len(statistics.scale)
    scale, zero = (jnp.repeat(s, rows, axis=0) for s in (statistics.scale, statistics.zero))
    return decode(jnp.asarray(statistics.codes), scale, zero)


def pack_solution(solution: Solution, factor: Factor, config: SpqrConfig) -> SpqrTensor:
    """The packed matrix of a solution."""
    return pack(
        solution.codes,
        solution.scale,
        solution.zero,
        bits=config.bits,
        group_size=config.group_size,
        scale_bits=config.scale_bits,
        zero_bits=config.zero_bits,
        outliers=solution.outliers,
        permutation=factor.permutation,
        stats_dtype=config.stats_dtype,
    )
