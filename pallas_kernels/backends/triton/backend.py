"""The kernels as backends: compiled for NVIDIA GPUs, or interpreted on any device."""

import functools

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends.backend import Backend
from pallas_kernels.backends.devices import compute_capability, device_kind
from pallas_kernels.backends.triton.dequantize import dequantize_matrix
from pallas_kernels.backends.triton.matmul import matmul
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.measurements import best_tile
from pallas_kernels.tuning.regimes import MOST_TOKENS

LEAST_CAPABILITY = 8.0
"""The first compute capability whose tensor cores and 16-bit arithmetic the kernels use."""


def _supported() -> bool:
    return (compute_capability() or 0.0) >= LEAST_CAPABILITY


def _dequantize(w: SpqrTensor, dtype: DTypeLike, *, interpret: bool) -> Float[Array, "out in"]:
    tile = best_tile("dequantize", w, 1, device_kind())
    return dequantize_matrix(w, dtype, tile=tile, interpret=interpret).T


# Jitted, so that equal products of a model are traced and lowered once.
_matmul = jax.jit(matmul, static_argnames="interpret")

PALLAS = Backend(
    name="pallas",
    needs=f"an NVIDIA GPU of compute capability {LEAST_CAPABILITY} or more",
    available=_supported,
    matmul=functools.partial(_matmul, interpret=False),
    dequantize=functools.partial(_dequantize, interpret=False),
    dtypes=tuple(MOST_TOKENS),
    kernels=True,
)

INTERPRET = Backend(
    name="interpret",
    needs="nothing",
    available=lambda: True,
    matmul=functools.partial(_matmul, interpret=True),
    dequantize=functools.partial(_dequantize, interpret=True),
    dtypes=tuple(MOST_TOKENS),
    kernels=True,
    # Thousands of times slower than XLA: for tests of the kernels.
    automatic=False,
)
