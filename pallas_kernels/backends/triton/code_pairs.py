"""Codes as pairs of float16 numbers, without conversions.

A uint32 holds codes of two blocks, sixteen bits apart. Let the lowest bit of a code q be bit p of its half. With all
other codes masked off, the half is the subnormal float16 number q · 2^(p − 24). Two codes cost one operation, and there
is no offset to subtract. The power of two goes into the factor of the code.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from pallas_kernels.backends.triton.instructions import Pair
from pallas_kernels.format.bit_layout import BLOCK

MANTISSA = 10
UNIT = 24
"""A float16 number whose only bit is the lowest is 2^−UNIT."""


def positions(bits: int) -> list[int]:
    """p of each code of a block."""
    return [_place(bits, j)[2] for j in range(BLOCK)]


def code_pairs(words: Sequence[UInt32[Array, "*tile"]]) -> Callable[[int], Pair]:
    """q · 2^(p − UNIT) of code j of the blocks in both halves of code words, as a function of j."""
    bits = len(words)
    shifted = functools.cache(lambda k, by: words[k] >> by if by else words[k])

    def pair(j: int) -> Pair:
        k, shift, position = _place(bits, j)
        if k < bits:
            return shifted(k, shift) & _twice((2**bits - 1) << position)
        return planes_pair([shifted(k, shift) << k for k in range(bits)], position)

    return pair


def planes_pair(planes: Sequence[UInt32[Array, "*tile"]], position: int) -> Pair:
    """q · 2^(position − UNIT) of the codes whose bit k is bit `position + k` of both halves of plane k."""
    parts = [plane & _twice(1 << (position + k)) for k, plane in enumerate(planes)]
    return functools.reduce(jnp.bitwise_or, parts)


def _place(bits: int, j: int) -> tuple[int, int, int]:
    """Word of code j, its right shift, and p. The code in the leftover bits has the word after the last."""
    per_word, unshifted = 16 // bits, MANTISSA // bits
    shift = bits * unshifted
    if j == BLOCK - 1 and BLOCK % bits:
        return bits, shift, 15 - shift
    k, i = divmod(j, per_word)
    return (k, 0, bits * i) if i < unshifted else (k, shift, bits * (i - unshifted))


def _twice(mask: int) -> int:
    return mask * 0x10001
