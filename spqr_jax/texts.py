"""Texts for calibration and evaluation: the package's excerpt of WikiText-2, token ids, and windows of any text."""

import lzma
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int32
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from pallas_kernels.errors import SpqrError

REFERENCE_STARTS = (
    269234, 219769, 24798, 39685, 177113, 22979, 63272, 16743, 132617, 126748, 87561, 116021, 107131, 240129, 158973,
    21071, 32001, 270403, 178274, 26758, 170281, 228319, 6341, 116199, 39449, 124136, 5504, 139689, 33369, 50625,
    267841, 29692,
)  # fmt: skip
"""First tokens of SmolLM2's 32 calibration windows with which the official code's figures were measured."""

PACKED_LENGTH = 512
"""Tokens per sequence of packed texts: the length of the commands' calibration sequences."""

SEPARATOR = "\n\n"
"""What stands between two texts that are joined, as between the lines of WikiText-2 in the papers."""


def wikitext2(split: Literal["valid", "test"]) -> str:
    """Reads WikiText-2's validation text, or the start of its test text (CC BY-SA, see `data/README.md`).

    Example:
      >>> len(wikitext2("valid"))
      1120192
    """
    return lzma.decompress(files("spqr_jax").joinpath(f"data/wikitext2_{split}.txt.xz").read_bytes()).decode()


def integer_ids(ids: ArrayLike) -> Int32[np.ndarray, "..."]:
    """Converts token ids to an array of int32.

    Raises:
      SpqrError: the ids are not integers (fractions and booleans are none), or exceed 32 bits.

    Example:
      >>> integer_ids([84, 104])
      array([ 84, 104], dtype=int32)
    """
    array = np.asarray(ids)
    if not array.size:
        return np.zeros(array.shape, np.int32)
    if array.dtype.kind not in "iu":
        raise SpqrError(f"token ids are integers, but these have type {array.dtype}, such as {array.flat[0]}")
    range_ = np.iinfo(np.int32)
    for id_ in (array.min(), array.max()):
        if not range_.min <= int(id_) <= range_.max:
            raise SpqrError(f"token id {id_} exceeds 32 bits, so it is in no vocabulary")
    return array.astype(np.int32)


def token_ids(texts: ArrayLike, tokenizer: PreTrainedTokenizerBase | None = None) -> Int32[np.ndarray, " tokens"]:
    """Token ids of a running text.

    Args:
      texts: a string, or strings, which are joined by an empty line and get no special tokens; or ids `[tokens]`,
        `[1, tokens]`, or lists of ids of any lengths, which are joined.
      tokenizer: of strings.

    Raises:
      SpqrError: there are strings but no tokenizer, or the ids are not integers.

    Example:
      >>> token_ids([[5, 6, 7], [8]])
      array([5, 6, 7, 8], dtype=int32)
      >>> len(token_ids(["sky", "sea"], tokenizer))
      8
    """
    if _is_text(texts):
        return _encode(texts, tokenizer)
    try:
        array = np.asarray(texts)
    except ValueError:  # lists of unequal length
        parts: Any = texts
        return np.concatenate([integer_ids(part).reshape(-1) for part in parts])
    return integer_ids(array).reshape(-1)


def pack(
    texts: ArrayLike, *, length: int = PACKED_LENGTH, tokenizer: PreTrainedTokenizerBase | None = None
) -> Int32[np.ndarray, "sequences length"]:
    """Joins texts and cuts them into adjacent sequences; an incomplete sequence at the end is dropped.

    Args:
      texts: strings or token ids, see `token_ids`.
      length: tokens per sequence.
      tokenizer: of strings.

    Raises:
      SpqrError: as `token_ids`, or the texts are shorter than one sequence.

    Example:
      >>> pack([[5, 6, 7], [8], [9, 10]], length=3)
      array([[ 5,  6,  7],
             [ 8,  9, 10]], dtype=int32)
    """
    ids = token_ids(texts, tokenizer)
    _check_windows(ids, 1, length)
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def calibration_sequences(
    texts: ArrayLike, max_positions: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Any:
    """Calibration tokens as `quantize` takes them, as an array `[sequences, tokens]`.

    Args:
      texts: an array, or lists of equal length, which stay as they are; or strings, or lists of ids of unequal length.
        These are packed into sequences of 512 tokens, or of the model's positions where they are fewer.
      max_positions: of the model.
      tokenizer: of strings.

    Raises:
      SpqrError: as `token_ids`.

    Example:
      >>> calibration_sequences([[5, 6, 7], [8], [9, 10]], max_positions=2)
      array([[ 5,  6],
             [ 7,  8],
             [ 9, 10]], dtype=int32)
    """
    if not isinstance(texts, str | list | tuple):
        return texts
    parts: Any = texts
    if not _is_text(parts) and len({np.shape(part) for part in parts}) < 2:
        return np.asarray(parts)
    ids = token_ids(parts, tokenizer)
    return pack(ids, length=max(1, min(PACKED_LENGTH, max_positions, len(ids))))


def random_windows(
    tokens: ArrayLike,
    sequences: int,
    length: int,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    first: int | None = None,
) -> Int32[np.ndarray, "sequences length"]:
    """Cuts windows at random places of a text, for calibration.

    Args:
      tokens: token ids or strings, see `token_ids`.
      sequences: number of windows; of a text of exactly one window, each is that one.
      length: tokens of each.
      seed: of their places.
      tokenizer: of strings.
      first: token in the place of each window's first one, see `Decoder.first_token`.

    Raises:
      SpqrError: as `token_ids`, the text is shorter than one window, or a number is out of its range.

    Example:
      >>> random_windows(tokenizer.encode(text), sequences=32, length=512).shape
      (32, 512)
    """
    if seed < 0:
        raise SpqrError(f"seed is {seed}, but must be at least 0")
    ids = token_ids(tokens, tokenizer)
    _check_windows(ids, sequences, length)
    # The last window is drawn only where it is the only one: drawing it too would move all windows of a seed.
    starts = np.random.default_rng(seed).integers(0, max(len(ids) - length, 1), sequences)
    return begun_with(first, windows_at(ids, starts, tokens_of_text(length, first)))


def tokens_of_text(window: int, first: int | None) -> int:
    """Tokens of a text in a window: all, or one less where another token begins it.

    Example:
      >>> tokens_of_text(1024, None), tokens_of_text(1024, first=2)
      (1024, 1023)
    """
    return window if first is None else window - 1


def begun_with(
    first: int | None, windows: Int[np.ndarray, "sequences length"]
) -> Int[np.ndarray, "sequences length_and_first"]:
    """Puts a token in front of each window; none where it is None.

    Example:
      >>> begun_with(2, np.array([[5, 6], [7, 8]]))
      array([[2, 5, 6],
             [2, 7, 8]])
    """
    return windows if first is None else np.pad(windows, ((0, 0), (1, 0)), constant_values=first)


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


def _is_text(texts: Any) -> bool:
    """Whether these are strings, and not ids."""
    return isinstance(texts, str) or (isinstance(texts, list | tuple) and any(isinstance(text, str) for text in texts))


def _encode(texts: Any, tokenizer: PreTrainedTokenizerBase | None) -> Int32[np.ndarray, " tokens"]:
    strings = [texts] if isinstance(texts, str) else list(texts)
    if other := [text for text in strings if not isinstance(text, str)]:
        raise SpqrError(f"among the texts is a {type(other[0]).__name__}: give strings only, or token ids only")
    if tokenizer is None:
        raise SpqrError("a text is given, but no tokenizer: give the model's tokenizer, or token ids")
    return integer_ids(tokenizer(SEPARATOR.join(strings), add_special_tokens=False, verbose=False)["input_ids"])


def _check_windows(ids: Int32[np.ndarray, " tokens"], sequences: int, length: int) -> None:
    for name, value in (("sequences", sequences), ("sequence length", length)):
        if value < 1:
            raise SpqrError(f"{name} is {value}, but must be at least 1")
    if len(ids) < length:
        raise SpqrError(
            f"the calibration text has {len(ids)} tokens, too few for windows of {length}: "
            "give a longer text or a shorter sequence length"
        )
