"""Bit layouts of the packed format: weight codes in words, statistics codes in bit planes of sixteen rows."""

import functools
import operator
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8, UInt16, UInt32

BLOCK = 16
"""Codes in a block, which fill `bits` sixteen-bit code words; also rows that share a word of a statistics plane."""


def pack_codes(codes: UInt8[Array | np.ndarray, "out in"], bits: int) -> UInt32[Array, "bits out half_blocks"]:
    """Packs `bits`-wide codes, sixteen to a block.

    Code word k of a block holds ⌊16/bits⌋ codes from its low bit up. The bits left over at the top of the words hold
    the last code, one bit per word, lowest first. In a uint32, `result[k, row, n]`, word k of block n is the low half
    and that of block n + half_blocks the high half. Missing codes of the last blocks are zero.

    Args:
      codes: weight codes below 2^bits, in quantization order.
      bits: width of a code.

    Example:
      >>> pack_codes(jnp.array([[1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]], jnp.uint8), 3)[:, 0, 0]
      Array([55505, 32768, 32768], dtype=uint32)
    """
    out, columns = codes.shape
    blocks = _even(-(-columns // BLOCK))
    padded = jnp.pad(codes, ((0, 0), (0, blocks * BLOCK - columns)))
    halves = padded.reshape(out, 2, blocks // 2, BLOCK).astype(jnp.uint32)
    per_word = 16 // bits
    words = []
    for k in range(bits):
        word = _or(halves[..., k * per_word + i] << (bits * i) for i in range(per_word))
        if per_word * bits < 16:
            word |= (halves[..., BLOCK - 1] >> k & 1) << 15
        words.append(word[:, 0] | word[:, 1] << 16)
    return jnp.stack(words)


def unpack_codes(words: UInt32[Array | np.ndarray, "bits out half_blocks"], columns: int) -> UInt8[Array, "out in"]:
    """Inverse of `pack_codes`.

    Args:
      words: code words, as `pack_codes` returns them.
      columns: number of codes per row.

    Example:
      >>> codes = jnp.arange(48, dtype=jnp.uint8).reshape(2, 24) % 8
      >>> bool((unpack_codes(pack_codes(codes, 3), 24) == codes).all())
      True
    """
    bits, out, half_blocks = words.shape
    per_word = 16 // bits
    mask = 2**bits - 1

    def code(j: int) -> Array:
        if j < bits * per_word:
            return (halves[j // per_word] >> (bits * (j % per_word)) & mask).astype(jnp.uint8)
        return _or((halves[k] >> 15 & 1) << k for k in range(bits)).astype(jnp.uint8)

    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=2)
    codes = jnp.stack([code(j) for j in range(BLOCK)], axis=-1)
    return codes.reshape(out, 2 * half_blocks * BLOCK)[:, :columns]


def pack_planes(codes: UInt8[Array | np.ndarray, "out groups"], bits: int) -> UInt16[Array, "bits out/16 groups"]:
    """Packs statistics codes as bit planes: bit r of `result[p, i, g]` is bit p of `codes[16 i + r, g]`.

    Example:
      >>> pack_planes(jnp.full((16, 1), 5, jnp.uint8), 3)[:, 0, 0]
      Array([65535,     0, 65535], dtype=uint16)
    """
    out, groups = codes.shape
    rows = jnp.asarray(codes, jnp.uint16).reshape(out // BLOCK, BLOCK, groups)
    return jnp.stack([_or((rows[:, r] >> p & 1) << r for r in range(BLOCK)) for p in range(bits)])


def unpack_planes(planes: UInt16[Array | np.ndarray, "bits row_blocks groups"]) -> UInt8[Array, "16*row_blocks groups"]:
    """Inverse of `pack_planes`."""
    bits, sixteenths, groups = planes.shape
    shifts = jnp.arange(BLOCK, dtype=jnp.uint16)[:, None]
    rows = _or((planes[p][:, None] >> shifts & 1) << p for p in range(bits))
    return rows.reshape(sixteenths * BLOCK, groups).astype(jnp.uint8)


def unpack_plane_rows(
    planes: UInt16[Array | np.ndarray, "bits row_blocks groups"], rows: Int[Array, " rows"]
) -> UInt8[Array, "rows groups"]:
    """Some rows of `unpack_planes`."""
    words = jnp.asarray(planes)[:, rows // BLOCK] >> (rows % BLOCK).astype(jnp.uint16)[:, None] & 1
    return _or(plane << p for p, plane in enumerate(words)).astype(jnp.uint8)


def _even(n: int) -> int:
    return n + n % 2


def _or(parts: Iterable[Array]) -> Array:
    return functools.reduce(operator.or_, parts)
