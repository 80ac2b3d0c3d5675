"""Small random packed matrices in every format."""

from dataclasses import replace
from typing import Any, get_args

import jax
import numpy as np
from helpers.random_packed import Order, Outliers, random_packed
from hypothesis import strategies as st

from pallas_kernels import SpqrTensor, spqr_dequantize
from pallas_kernels.format.tensor import BITS

OUTLIERS = get_args(Outliers)
DEQUANTIZE = jax.jit(spqr_dequantize)


def small_matrix(
    seed: int,
    *,
    out: int = 32,
    columns: int = 64,
    permutation: Order = None,
    padding: int = 0,
    **form: Any,
) -> SpqrTensor:
    """`random_packed` of a seed; `padding` places for outliers are left over."""
    rng = np.random.default_rng(seed)
    packed = random_packed(rng, out, columns, permutation=permutation, **form)
    if packed.outliers is None:
        return packed
    return replace(packed, outliers=packed.outliers.pad(packed.outliers.capacity + padding))


@st.composite
def formats(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `small_matrix` that matrices of one format share."""
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
