"""The product of one row of activations with packed codes, which XLA fuses into one pass over the codes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from pallas_kernels.backends.statistics import scales, zeros
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.tensor import SpqrTensor


def one_row_product(x: Float[Array, " in"], w: SpqrTensor) -> Float[Array, " out"]:
    """y = x ŵᵀ in float32, for x in quantization order.

    y_r = Σ_g scale_rg (Σ_{i in g} x_i code_ri − zero_rg Σ_{i in g} x_i) + Σ_{outliers of r} x_i value. Each code word
    is read once: 0.5 ns a weight on one core, where unpacking the weight takes 2.3 (3072 × 576, 3 bits).

    Example:
      >>> y = one_row_product(x[0][packed.permutation], packed)
      >>> bool(jnp.allclose(y, spqr_matmul(x[0], packed, implementation="xla"), atol=1e-4))
      True
    """
    _, out, half_blocks = w.codes.shape
    x = x.astype(jnp.float32)
    halves = jnp.pad(x, (0, 2 * half_blocks * BLOCK - w.in_features)).reshape(2, half_blocks, BLOCK)
    scale, zero = scales(w), zeros(w)
    width = min(w.group_size, BLOCK)
    sums = jnp.zeros((out, half_blocks), jnp.float32)
    for half, first in np.ndindex(2, BLOCK // width):
        members = range(first * width, (first + 1) * width)
        weighted = sum(_code(w.codes, half, j).astype(jnp.float32) * halves[half, :, j] for j in members)
        plain = sum(halves[half, :, j] for j in members)
        groups = _groups(w, half, members.start)
        sums += scale[:, groups] * (weighted - zero[:, groups] * plain)
    # A product with ones, not a sum: XLA for CPUs computes it with vector instructions, twice as fast.
    y = jnp.matmul(sums, jnp.ones(half_blocks))
    if (outliers := w.outliers) is not None:
        y = y.at[outliers.rows()].add(outliers.values.astype(jnp.float32) * x[outliers.columns])
    return y


def _code(words: UInt32[Array | np.ndarray, "bits out half_blocks"], half: int, j: int) -> UInt32[Array, "out _"]:
    """Code j of every block of a half, see `bit_layout.pack_codes`."""
    bits, shift = len(words), 16 * half
    per_word = 16 // bits
    if j < bits * per_word:
        return jnp.asarray(words[j // per_word] >> (shift + bits * (j % per_word)) & (2**bits - 1))
    return jnp.asarray(sum((words[k] >> (shift + 15) & 1) << k for k in range(bits)))


def _groups(w: SpqrTensor, half: int, j: int) -> np.ndarray:
    """The group of code j of every block of a half; blocks of padding have the last one."""
    half_blocks = w.codes.shape[-1]
    columns = (half * half_blocks + np.arange(half_blocks)) * BLOCK + j
    return np.minimum(columns, w.in_features - 1) // w.group_size
