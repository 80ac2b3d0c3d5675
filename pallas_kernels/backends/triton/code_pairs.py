"""Codes as pairs of float16 numbers, without conversions.

A code word holds codes of two blocks, sixteen bits apart. Where a code's lowest bit stands at bit p of its half, and
the others are masked off, the half is a float16 number: the subnormal q · 2^(p − 24). Two codes cost one operation,
and there is no offset to take off again; the power of two goes into what the code is multiplied by.
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
    """q · 2^(p − UNIT) of code j of the block in the low half and of that in the high half of code words, by j."""
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
    """The word of code j, how far it is shifted right, and p; the word after the last is what is left over."""
    per_word, unshifted = 16 // bits, MANTISSA // bits
    shift = bits * unshifted
    if j == BLOCK - 1 and BLOCK % bits:
        return bits, shift, 15 - shift
    k, i = divmod(j, per_word)
    return (k, 0, bits * i) if i < unshifted else (k, shift, bits * (i - unshifted))


def _twice(mask: int) -> int:
    return mask * 0x10001
