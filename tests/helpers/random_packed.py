"""Packed matrices with random contents, in any format."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedStatistics, SpqrTensor, pack, trim

# In one program: op by op, JAX compiles each operation for each shape.
PACK = jax.jit(pack, static_argnames=("bits", "group_size", "scale_bits", "zero_bits", "stats_dtype"))

Outliers = Literal["none", "empty", "one row", "first column", "everywhere"]
Order = np.ndarray | Literal["random"] | None


def random_packed(
    rng: np.random.Generator,
    out: int,
    in_features: int,
    *,
    bits: int = 3,
    group_size: int = 16,
    stats_bits: int | None = 3,
    stats_group_size: int = 16,
    stats_dtype: str = "float16",
    outliers: Outliers = "everywhere",
    permutation: Order = "random",
) -> SpqrTensor:
    """A matrix `[out, in_features]`; where a few of its weights are outliers, they are 5 %."""
    groups = in_features // group_size

    def statistics(low: float, high: float):
        if stats_bits is None:
            return rng.uniform(low, high, (out, groups)).astype(np.float32)
        shape = out // stats_group_size, groups
        return QuantizedStatistics(
            rng.integers(0, 2**stats_bits, (out, groups)).astype(np.uint8),
            rng.uniform(high - low, 2 * (high - low), shape).astype(np.float32) / 2**stats_bits,
            -low / (high - low) * rng.uniform(0.5, 2, shape).astype(np.float32) * 2**stats_bits,
        )

    mask = np.zeros((out, in_features), bool)
    if outliers == "one row":
        mask[rng.integers(out)] = True
    elif outliers == "first column":
        mask[:, 0] = True
    elif outliers == "everywhere":
        mask = rng.random(mask.shape) < 0.05
    residual = 0.05 * rng.standard_normal(mask.shape, np.float32)
    packed = PACK(
        jnp.asarray(rng.integers(0, 2**bits, mask.shape).astype(np.uint8)),
        statistics(0.01, 0.03),
        statistics(2**bits * 0.3, 2**bits * 0.7),
        bits=bits,
        group_size=group_size,
        scale_bits=stats_bits,
        zero_bits=stats_bits,
        outliers=None if outliers == "none" else (jnp.asarray(mask), jnp.asarray(residual)),
        permutation=_order(rng, in_features, permutation),
        stats_dtype=stats_dtype,
    )
    return trim(packed)


def packed_of_three_bits(
    rng: np.random.Generator,
    out: int,
    columns: int,
    *,
    share: float | None,
    largest: float = 0.1,
    permutation: Order = "random",
) -> SpqrTensor:
    """A matrix with 16-bit statistics, scales up to `largest`; `share` of its weights are outliers, None: without."""
    scale = rng.uniform(largest / 2, largest, (out, columns // 16)).astype(np.float32)
    outliers = rng.random((out, columns)) < (share or 0), rng.standard_normal((out, columns), np.float32)
    codes = rng.integers(0, 8, (out, columns), np.uint8)
    permutation = _order(rng, columns, permutation)
    zero = np.full(scale.shape, 3.5, np.float32)
    outliers = None if share is None else outliers
    return trim(PACK(codes, scale, zero, bits=3, group_size=16, outliers=outliers, permutation=permutation))


def _order(rng: np.random.Generator, columns: int, permutation: Order) -> np.ndarray | None:
    return rng.permutation(columns) if isinstance(permutation, str) else permutation
