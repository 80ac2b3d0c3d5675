"""Random packed matrices in every format."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from pallas_kernels import (
    QuantizedStatistics,
    SpqrTensor,
    pack,
    spqr_dequantize,
    trim,
)
from pallas_kernels.format.tensor import BITS

OUTLIERS = ("none", "empty", "some", "one row")


PACK = jax.jit(pack, static_argnames=("bits", "group_size", "scale_bits", "zero_bits", "stats_dtype"))


DEQUANTIZE = jax.jit(spqr_dequantize)


def random_packed(
    seed: int,
    *,
    out: int = 32,
    columns: int = 64,
    bits: int = 3,
    group_size: int = 16,
    stats_bits: int | None = 3,
    stats_group_size: int = 16,
    outliers: str = "some",
    permutation: Any = None,
    padding: int = 0,
    **options: Any,
) -> SpqrTensor:
    rng = np.random.default_rng(seed)
    groups = columns // group_size

    def statistics() -> Any:
        if stats_bits is None:
            return rng.uniform(0.1, 4, (out, groups)).astype(np.float32)
        scale, zero = rng.uniform(0.1, 4, (2, out // stats_group_size, groups)).astype(np.float32)
        return QuantizedStatistics(rng.integers(0, 2**stats_bits, (out, groups), np.uint8), scale, zero)

    mask = rng.random((out, columns)) < (0.05 if outliers == "some" else 0)
    if outliers == "one row":
        mask[rng.integers(out)] = True
    residuals = rng.standard_normal((out, columns), np.float32)
    packed = trim(
        PACK(
            rng.integers(0, 2**bits, (out, columns), np.uint8),
            statistics(),
            statistics(),
            bits=bits,
            group_size=group_size,
            scale_bits=stats_bits,
            zero_bits=stats_bits,
            outliers=None if outliers == "none" else (mask, residuals),
            permutation=permutation,
            **options,
        )
    )
    if outliers == "none":
        return packed
    return replace(packed, outliers=packed.outliers.pad(packed.outliers.capacity + padding))


@st.composite
def formats(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `random_packed` that matrices of one format share."""
    group_size = draw(st.sampled_from((8, 16, 32)))
    columns = 3 * group_size
    seed = draw(st.integers(0, 2**32 - 1))
    return {
        "columns": columns,
        "bits": draw(st.sampled_from(BITS)),
        "group_size": group_size,
        "stats_bits": draw(st.sampled_from((None, *BITS))),
        "stats_group_size": draw(st.sampled_from((16, 32))),
        "permutation": np.random.default_rng(seed).permutation(columns) if draw(st.booleans()) else None,
        "padding": draw(st.sampled_from((0, 5))),
    }
