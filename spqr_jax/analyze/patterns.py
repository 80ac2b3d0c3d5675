"""Patterns of the sensitive weights of a matrix: few rows, few columns, some heads, or unstructured.

Source: the patterns are those that Dettmers et al. 2023 (arXiv 2306.03078), section 3, show in pictures. These measures
of them are this project's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binom

from spqr_jax.analyze.sensitivity import Heads

OUTLIERS = 0.01
"""The share of most sensitive weights that count as outliers in these measures."""

SIGNIFICANCE = 0.01
"""Probability that outliers at random places make any row (or column) of a matrix count as crowded."""


class Patterns(NamedTuple):
    """The patterns in one matrix.

    Attributes:
      row_outliers, column_outliers: share of the outliers in rows, and in columns, with significantly many of them, see
        `crowded`; an outlier where two such lines cross counts in both.
      unstructured: share of the outliers in none of these rows and columns.
      head_stripes, head_contrast, rotary_period: see the functions of these names; None without heads.
    """

    row_outliers: float
    column_outliers: float
    unstructured: float
    head_stripes: float | None
    head_contrast: float | None
    rotary_period: float | None


def find_patterns(sensitivity: Float[np.ndarray, "out in"], heads: Heads | None) -> Patterns:
    """All measures of one matrix; the lines of a head are rows or columns, see `Heads`.

    Example:
      >>> found = find_patterns(np.random.default_rng(0).random((64, 64)), Heads(0, 16))
      >>> found.row_outliers, found.unstructured
      (0.0, 1.0)
    """
    mask = most_sensitive(sensitivity, OUTLIERS)
    rows, columns = crowded(mask), crowded(mask.T)
    total = max(mask.sum(), 1)
    levels = None
    if heads is not None:
        levels = line_levels(sensitivity if heads.axis == 0 else sensitivity.T).reshape(-1, heads.width)
    return Patterns(
        row_outliers=float(mask[rows].sum() / total),
        column_outliers=float(mask[:, columns].sum() / total),
        unstructured=float(mask[~rows][:, ~columns].sum() / total),
        head_stripes=None if levels is None else head_stripes(levels),
        head_contrast=None if levels is None else head_contrast(levels),
        rotary_period=None if levels is None else rotary_period(levels),
    )


def most_sensitive(sensitivity: Float[np.ndarray, "out in"], share: float) -> Bool[np.ndarray, "out in"]:
    """A mask of this share of a matrix, its most sensitive weights; weights with sensitivity 0 are left out.

    Example:
      >>> most_sensitive(np.array([[1.0, 3.0], [2.0, 0.0]]), 0.5)
      array([[False,  True],
             [ True, False]])
    """
    count = round(share * sensitivity.size)
    mask = np.zeros(sensitivity.size, bool)
    mask[np.argsort(-sensitivity, axis=None, kind="stable")[:count]] = True
    return mask.reshape(sensitivity.shape) & (sensitivity > 0)


def crowded(mask: Bool[np.ndarray, "lines length"]) -> Bool[np.ndarray, " lines"]:
    """The lines with significantly many outliers: lines · P(B ≥ count) < 0.01, B ~ Binomial(length, p).

    p is the share of outliers in the whole matrix: the null hypothesis is that they are at random places. Multiplied by
    the number of lines (Bonferroni), the probability bounds that of one such line or more in the matrix. In 1000 rows
    of 1000 weights with 1 % outliers, a row is crowded from 27 on; the mean is 10.

    Example:
      >>> mask = np.zeros((100, 100), bool)
      >>> mask[3, :20] = True
      >>> np.flatnonzero(crowded(mask))
      array([3])
    """
    lines, length = mask.shape
    return lines * binom.sf(mask.sum(axis=1) - 1, length, mask.mean()) < SIGNIFICANCE


def line_levels(sensitivity: Float[np.ndarray, "lines length"]) -> Float[np.ndarray, " lines"]:
    """log of the mean sensitivity of each line; a line of zeros takes the lowest level of the others."""
    means = sensitivity.mean(axis=1, dtype=np.float64)
    lowest = means[means > 0].min(initial=np.inf)
    return np.log(np.maximum(means, lowest)) if np.isfinite(lowest) else np.zeros(len(means))


def head_stripes(levels: Float[np.ndarray, "heads width"]) -> float:
    """Share of the variance of line levels that lies between heads, adjusted: 1 − (S_within / (n − k)) / (S / (n − 1)).

    S is the sum of squares around the mean of all n lines, S_within that around the mean of each of the k heads. The
    share is 1 where all lines of a head are alike and heads differ. Where heads do not matter, its mean is 0.

    Source: the adjusted R² of a one-way analysis of variance.

    Example:
      >>> head_stripes(np.array([[0.0, 0.0], [1.0, 1.0]]))
      1.0
    """
    heads, lines = len(levels), levels.size
    total = np.square(levels - levels.mean()).sum() / (lines - 1)
    if heads == 1 or total == 0:
        return 0.0
    within = np.square(levels - levels.mean(axis=1, keepdims=True)).sum() / (lines - heads)
    return float(1 - within / total)


def head_contrast(levels: Float[np.ndarray, "heads width"]) -> float:
    """The sensitivity of the most sensitive head over that of the least, in the geometric mean of their lines.

    It complements `head_stripes`: where lines are alike, small differences of heads are a large share of the variance.

    Example:
      >>> round(head_contrast(np.log([[1.0, 4.0], [8.0, 8.0]])), 6)
      4.0
    """
    return float(np.exp(np.ptp(levels.mean(axis=1))))


def rotary_period(levels: Float[np.ndarray, "heads width"]) -> float:
    """Correlation of the levels of lines i and i + width/2 of a head, which the rotary embedding rotates together.

    Σ a b / √(Σ a² Σ b²), summed over all heads, with a and b the levels in the first and in the second half of a head,
    each less its mean. Stripes of heads and of halves therefore do not count. The correlation is 1 where the second
    half repeats the first, and 0 ± √(2/n) for n independent lines.

    Example:
      >>> rotary_period(np.array([[1.0, 2.0, 3.0, 4.0]]))
      1.0
    """
    halves = levels.reshape(len(levels), 2, -1)
    first, second = (halves - halves.mean(axis=2, keepdims=True)).transpose(1, 0, 2)
    scale = np.sqrt(np.square(first).sum() * np.square(second).sum())
    return float((first * second).sum() / scale) if scale > 0 else 0.0


def error_left(sensitivity: Float[np.ndarray, "out in"], shares: Sequence[float]) -> Float[np.ndarray, " shares"]:
    """Σ s of the weights that remain when these shares of most sensitive weights are kept exactly, over Σ s.

    Example:
      >>> error_left(np.array([[1.0, 3.0], [2.0, 0.0]]), [0.25, 1.0])
      array([0.5, 0. ])
    """
    rising = np.sort(sensitivity, axis=None).astype(np.float64)
    left = np.concatenate([[0.0], np.cumsum(rising)])
    counts = [sensitivity.size - round(share * sensitivity.size) for share in shares]
    return left[counts] / left[-1] if left[-1] > 0 else np.zeros(len(counts))
