"""How the compiler spreads a tile over threads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def by_fours(index: Int[Array, "*tile"]) -> Int[Array, "*tile"]:
    """The same index, of which the compiler sees no more than four neighbours in a row.

    Threads read four neighbouring words of codes at once, 16 bytes. Where it sees more neighbours of 16-bit numbers,
    the compiler has threads read eight of them, and spreads all that is computed together with them accordingly.
    """
    four = jnp.int32(4)
    return jax.lax.div(index, four) * four + jax.lax.rem(index, four)
