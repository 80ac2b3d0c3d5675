"""Calibration tokens as the commands take them, and the table of kinds of calibration files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.models import encode, read_text
from spqr_jax.texts import random_windows, wikitext2


class Kind(NamedTuple):
    """A kind of calibration file.

    Attributes:
      read: token ids of a file: `[tokens]` of a running text, or `[sequences, tokens]`.
      running: whether these are the ids of a running text, to be cut into sequences at random places. Otherwise they
        are sequences, taken as they are.
    """

    read: Callable[[Path, PreTrainedTokenizerFast | None], Int[np.ndarray, "..."]]
    running: bool


def read_running_text(file: Path, tokenizer: PreTrainedTokenizerFast | None) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text file.

    Raises:
      SpqrError: the file is not UTF-8, or the checkpoint came without a tokenizer.
    """
    return np.array(encode(tokenizer, read_text(file)))


def read_token_ids(file: Path, tokenizer: PreTrainedTokenizerFast | None) -> Int[np.ndarray, "sequences tokens"]:
    """Token ids of a NumPy file; the tokenizer is not needed.

    Raises:
      SpqrError: the file is not one array of integers `[sequences, tokens]`.
    """
    try:
        with file.open("rb") as content:
            array = np.lib.format.read_array(content, allow_pickle=False)
    except ValueError as error:
        raise SpqrError(f"{file} is not an array of NumPy: {error}") from None
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 2:
        raise SpqrError(
            f"{file} has {array.dtype} of shape {list(array.shape)}, but token ids are integers [sequences, tokens]"
        )
    # An id too large for int32 is in no vocabulary, and must not wrap into one.
    return np.clip(array.astype(np.int64), -1, np.iinfo(np.int32).max).astype(np.int32)


TEXT = Kind(read_running_text, running=True)
"""A text file in UTF-8: any suffix that is not in the table."""

KINDS: Mapping[str, Kind] = {
    ".npy": Kind(read_token_ids, running=False),
}
"""Kinds of calibration files by suffix; the README of `spqr_jax` says how to add one."""


def calibration_tokens(
    tokenizer: PreTrainedTokenizerFast | None, file: Path | None, sequences: int, length: int, seed: int
) -> Int[np.ndarray, "sequences tokens"]:
    """Calibration sequences of a file: cut out of its running text at random places, or as the file has them.

    Args:
      tokenizer: of the model; None if it has none.
      file: its suffix says what it has, see `KINDS`; None for WikiText-2's validation text.
      sequences: number of sequences to cut out of a running text.
      length: tokens of each.
      seed: of their places.

    Raises:
      SpqrError: the file cannot be used, or its text is shorter than one sequence.
    """
    kind, ids = _read(file, tokenizer)
    return random_windows(ids, sequences, length, seed) if kind.running else ids


def running_text(tokenizer: PreTrainedTokenizerFast | None, file: Path | None) -> Int[np.ndarray, " tokens"]:
    """Token ids of a running text, a part of which is to be held out.

    Raises:
      SpqrError: the file has sequences, or cannot be used.
    """
    if file is not None and not _kind(file).running:
        raise SpqrError(
            f"--near-lossless holds a part of the calibration text out, but {file} has token ids: give text"
        )
    return _read(file, tokenizer)[1]


def _read(file: Path | None, tokenizer: PreTrainedTokenizerFast | None) -> tuple[Kind, Int[np.ndarray, "..."]]:
    if file is None:
        return TEXT, np.array(encode(tokenizer, wikitext2("valid")))
    kind = _kind(file)
    return kind, kind.read(file, tokenizer)


def _kind(file: Path) -> Kind:
    return KINDS.get(file.suffix, TEXT)
