"""Texts for calibration and evaluation: the package's excerpt of WikiText-2, and windows of any text."""

import lzma
from importlib.resources import files
from typing import Literal

import numpy as np
from jaxtyping import Int

from pallas_kernels.errors import SpqrError

REFERENCE_STARTS = (
    269234, 219769, 24798, 39685, 177113, 22979, 63272, 16743, 132617, 126748, 87561, 116021, 107131, 240129, 158973,
    21071, 32001, 270403, 178274, 26758, 170281, 228319, 6341, 116199, 39449, 124136, 5504, 139689, 33369, 50625,
    267841, 29692,
)  # fmt: skip
"""First tokens of SmolLM2's 32 calibration windows with which the official code's figures were measured."""


def wikitext2(split: Literal["valid", "test"]) -> str:
    """Reads WikiText-2's validation text, or the start of its test text (CC BY-SA, see `data/README.md`).

    Example:
      >>> len(wikitext2("valid"))
      1120192
    """
    return lzma.decompress(files("spqr_jax").joinpath(f"data/wikitext2_{split}.txt.xz").read_bytes()).decode()


def random_windows(
    tokens: Int[np.ndarray, " tokens"], sequences: int, length: int, seed: int = 0
) -> Int[np.ndarray, "sequences length"]:
    """Cuts windows at random places of a text, for calibration.

    Raises:
      SpqrError: the text is shorter than one window, or a number is out of its range.

    Example:
      >>> random_windows(np.array(tokenizer.encode(text)), sequences=32, length=512).shape
      (32, 512)
    """
    for name, value, least in (("sequences", sequences, 1), ("sequence length", length, 1), ("seed", seed, 0)):
        if value < least:
            raise SpqrError(f"{name} is {value}, but must be at least {least}")
    if len(tokens) <= length:
        raise SpqrError(
            f"the calibration text has {len(tokens)} tokens, too few for windows of {length}: "
            "give a longer text or a shorter sequence length"
        )
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, sequences)
    return windows_at(tokens, starts, length)


def windows_at(
    tokens: Int[np.ndarray, " tokens"], starts: Int[np.ndarray, " sequences"], length: int
) -> Int[np.ndarray, "sequences length"]:
    """Cuts the windows of `length` tokens that begin at `starts`.

    Example:
      >>> windows_at(np.arange(9), np.array([0, 5]), 3)
      array([[0, 1, 2],
             [5, 6, 7]], dtype=int32)
    """
    return np.asarray(tokens, np.int32)[np.asarray(starts)[:, None] + np.arange(length)]
