"""ALiBi: attention that is biased by the distance of tokens (Press et al. 2022)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " heads"]:
    """Amount by which each head reduces q·k per token of distance (Press et al. 2022).

    2^(−8i/n) for i = 1 … n, with n the largest power of two up to the number of heads; the heads beyond n take every
    other slope, from the first on, of the series for 2n.
    """
    n = 2 ** (num_heads.bit_length() - 1)
    first, beyond = np.arange(1, n + 1), np.arange(1, 2 * (num_heads - n), 2)
    return 2.0 ** (-8 / n * np.concatenate([first, beyond / 2]))


def alibi_bias(slot_positions: Int[Array, "batch slots"], num_heads: int) -> Float[Array, "batch heads slots"]:
    """slope · position of the key; in the softmax over a row of scores it equals −slope · distance.

    Slopes, positions and products are rounded to bfloat16, as in the code that Falcon was released with.
    """
    slopes, positions = _bfloat16(alibi_slopes(num_heads)[:, None]), _bfloat16(slot_positions[:, None, :])
    return _bfloat16(slopes * positions)


def _bfloat16(x: Array | np.ndarray) -> Array:
    """Rounds to bfloat16 but returns float32: XLA may remove a cast to bfloat16 and back."""
    return jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), exponent_bits=8, mantissa_bits=7)
