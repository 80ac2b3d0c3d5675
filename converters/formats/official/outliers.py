"""Outliers in the official GPU format, in either of its two orders.

An entry of `col_vals` is an int32: the column in quantization order in its low half, a float16 value in its high half.
In CSR the entries of a row follow one another; `row_offsets` is `[out + 1]`. In PTCSR sixteen rows take turns, each
padded with zeros to the longest of them, so that entry j belongs to row j mod 16 of its sixteen; `row_offsets` is
`[out/16 + 1]`. An entry of 0 in PTCSR is padding.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int32, Shaped

from converters.errors import ConversionError
from converters.formats.official.quantized_matrix import StoredOutliers

ROWS = 16


def decode_outliers(
    row_offsets: Int32[np.ndarray, " offsets"], col_vals: Shaped[np.ndarray, " entries"], out: int, name: str
) -> StoredOutliers:
    """Decodes outliers into CSR form, in the order of the entries; the length of `row_offsets` determines their order.

    Raises:
      ConversionError: the offsets do not fit the matrix or the entries.
    """
    if row_offsets.size not in (out + 1, out // ROWS + 1):
        raise ConversionError(
            f"{name}.row_offsets has {row_offsets.size} entries, but {out} rows take {out + 1} (CSR) "
            f"or {out // ROWS + 1} (PTCSR)"
        )
    falls = np.count_nonzero(np.diff(row_offsets) < 0)
    if row_offsets[0] != 0 or row_offsets[-1] != col_vals.size or falls:
        raise ConversionError(
            f"{name}.row_offsets must rise from 0 to the {col_vals.size} entries of col_vals, but runs from "
            f"{row_offsets[0]} to {row_offsets[-1]} and falls {falls} times"
        )
    # Without outliers the official writer leaves an empty array of floats.
    words = col_vals.view(np.uint32) if col_vals.size else np.zeros(0, np.uint32)
    if row_offsets.size != out + 1:
        row_offsets, words = _compressed_rows(row_offsets, words, name)
    return StoredOutliers(row_offsets, words.astype(np.uint16), (words >> 16).astype(np.uint16).view(np.float16))


def encode_outliers(
    outliers: StoredOutliers, order: Literal["csr", "ptcsr"]
) -> tuple[Int32[np.ndarray, " offsets"], Int32[np.ndarray, " entries"]]:
    """`row_offsets` and `col_vals`; inverse of `decode_outliers`."""
    words = outliers.values.view(np.uint16).astype(np.uint32) << 16 | outliers.columns
    row_offsets = outliers.offsets
    if order == "ptcsr":
        row_offsets, words = _taking_turns(row_offsets, words, outliers.rows)
    return row_offsets.astype(np.int32), words.view(np.int32)


def _compressed_rows(offsets: np.ndarray, words: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """From PTCSR to CSR."""
    if odd := np.count_nonzero(offsets % ROWS):
        raise ConversionError(f"{name}.row_offsets has {odd} entries that are not multiples of {ROWS} (PTCSR)")
    # Sixteen rows start at a multiple of sixteen, so an entry's place determines its row among them.
    rows = ROWS * np.repeat(np.arange(offsets.size - 1), np.diff(offsets)) + np.arange(words.size) % ROWS
    rows, words = rows[words != 0], words[words != 0]
    counts = np.bincount(rows, minlength=ROWS * (offsets.size - 1))
    return _offsets(counts), words[np.argsort(rows, kind="stable")]


def _taking_turns(offsets: np.ndarray, words: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From CSR to PTCSR."""
    longest = np.diff(offsets).reshape(-1, ROWS).max(axis=1)
    starts = _offsets(ROWS * longest)
    turns = np.arange(words.size) - offsets[rows]
    entries = np.zeros(starts[-1], np.uint32)
    entries[starts[rows // ROWS] + ROWS * turns + rows % ROWS] = words
    return starts, entries


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
