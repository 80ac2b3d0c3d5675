"""Packed matrices with random contents, in any format."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedStatistics, SpqrTensor, pack, trim

Outliers = Literal["none", "one row", "first column", "everywhere"]


def random_packed(
    rng: np.random.Generator,
    out: int,
    in_features: int,
    *,
    bits: int = 3,
    group_size: int = 16,
    stats_bits: int | None = 3,
    stats_group_size: int = 16,
    outliers: Outliers = "everywhere",
    permuted: bool = True,
) -> SpqrTensor:
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
    packed = pack(
        jnp.asarray(rng.integers(0, 2**bits, mask.shape).astype(np.uint8)),
        statistics(0.01, 0.03),
        statistics(2**bits * 0.3, 2**bits * 0.7),
        bits=bits,
        group_size=group_size,
        scale_bits=stats_bits,
        zero_bits=stats_bits,
        outliers=None if outliers == "none" else (jnp.asarray(mask), jnp.asarray(residual)),
        permutation=rng.permutation(in_features) if permuted else None,
    )
    return trim(packed)
