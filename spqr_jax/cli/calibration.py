"""Calibration tokens as the commands take them, and the table of kinds of text files."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.documents import joined_text, json_rows, parquet_rows
from spqr_jax.cli.models import encode
from spqr_jax.cli.public_texts import PUBLIC_TEXTS, Use, public_text
from spqr_jax.cli.text_files import read_text
from spqr_jax.texts import integer_ids, random_windows, wikitext2

Tokens = Int[np.ndarray, "..."]


class Kind(NamedTuple):
    """A kind of text file.

    Attributes:
      read: token ids of a file: `[tokens]` of a running text, or `[sequences, tokens]`.
      running: whether these are the ids of a running text, to be cut into sequences at random places. Otherwise they
        are sequences, taken as they are.
    """

    read: Callable[[Path, PreTrainedTokenizerFast | None], Tokens]
    running: bool


def read_running_text(file: Path, tokenizer: PreTrainedTokenizerFast | None) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text file.

    Raises:
      SpqrError: the file is not UTF-8, or the checkpoint came without a tokenizer.
    """
    return integer_ids(encode(tokenizer, read_text(file)))


def read_documents(
    rows: Callable[[Path], list[Any]], file: Path, tokenizer: PreTrainedTokenizerFast | None
) -> Int[np.ndarray, " tokens"]:
    """Token ids of the texts or conversations in a file, whose rows a function of `documents` reads.

    Raises:
      SpqrError: the file cannot be read, or the checkpoint came without a tokenizer.
    """
    return integer_ids(encode(tokenizer, joined_text(rows(file), tokenizer, str(file))))


def read_token_ids(file: Path, tokenizer: PreTrainedTokenizerFast | None) -> Int[np.ndarray, "sequences tokens"]:
    """Token ids of a NumPy file; the tokenizer is not needed.

    Raises:
      SpqrError: the file is not one array of integers `[sequences, tokens]`, or an id exceeds 32 bits.
    """
    try:
        with file.open("rb") as content:
            array = np.lib.format.read_array(content, allow_pickle=False)
    except ValueError as error:
        raise SpqrError(f"{file} is not an array of NumPy: {error}") from None
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise SpqrError(
            f"{file} has {array.dtype} of shape {list(array.shape)}, but token ids are integers [sequences, tokens]"
        )
    try:
        return integer_ids(array)
    except SpqrError as error:
        raise SpqrError(f"{file}: {error}") from None


TEXT = Kind(read_running_text, running=True)
"""A text file in UTF-8: any suffix that is not in the table."""

JSON = Kind(partial(read_documents, json_rows), running=True)
"""A file of JSON, one row a line or one list of rows."""

KINDS: Mapping[str, Kind] = {
    ".json": JSON,
    ".jsonl": JSON,
    ".ndjson": JSON,
    ".npy": Kind(read_token_ids, running=False),
    ".parquet": Kind(partial(read_documents, parquet_rows), running=True),
}
"""Kinds of text files by suffix; the README of `spqr_jax` says how to add one."""


def calibration_tokens(
    tokenizer: PreTrainedTokenizerFast | None,
    texts: Sequence[str] | None,
    sequences: int,
    length: int,
    seed: int,
    first: int | None = None,
) -> Int[np.ndarray, "sequences tokens"]:
    """Calibration sequences: cut out of a running text at random places, or as files of token ids have them.

    Args:
      tokenizer: of the model; None if it has none.
      texts: files, whose suffixes say what they have, see `KINDS`, or names of public texts; none for WikiText-2's
        validation text. One sequence of more than `length` token ids is a running text.
      sequences: number of sequences to cut out of a running text.
      length: tokens of each.
      seed: of their places.
      first: token in front of each of them, see `Decoder.first_token`.

    Raises:
      SpqrError: a text cannot be read, or is shorter than one sequence, or files of token ids do not fit each other.
    """
    parts = read_texts(tokenizer, texts, Use.CALIBRATION)
    if all(part.ndim == 1 for part in parts):
        return random_windows(np.concatenate(parts), sequences, length, seed, first=first)
    if any(part.ndim == 1 or part.shape[1] != parts[0].shape[1] for part in parts):
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise SpqrError(f"calibration has tokens of shapes {shapes}: give text only, or sequences of one length")
    ids = np.concatenate(parts)
    if len(ids) == 1 and ids.size > length:
        return random_windows(ids, sequences, length, seed, first=first)
    return ids


def running_text(tokenizer: PreTrainedTokenizerFast | None, texts: Sequence[str] | None) -> Int[np.ndarray, " tokens"]:
    """Token ids of a running text, a part of which is to be held out.

    Raises:
      SpqrError: a text has sequences, or cannot be read.
    """
    for text in texts or ():
        if not _kind(text).running:
            raise SpqrError(
                f"--near-lossless holds a part of the calibration text out, but {text} has token ids: give text"
            )
    return np.concatenate(read_texts(tokenizer, texts, Use.CALIBRATION))


def read_texts(tokenizer: PreTrainedTokenizerFast | None, texts: Sequence[str] | None, use: Use) -> list[Tokens]:
    """Token ids of each text: `[tokens]` of a running text, `[sequences, tokens]` of a file of token ids.

    Args:
      tokenizer: of the model; None if it has none.
      texts: files or names of public texts; none for the package's text.
      use: of the texts.

    Raises:
      SpqrError: a text cannot be read.
    """
    if not texts:
        return [integer_ids(encode(tokenizer, wikitext2("valid" if use is Use.CALIBRATION else "test")))]
    return [_read(text, use, tokenizer) for text in texts]


def _read(text: str, use: Use, tokenizer: PreTrainedTokenizerFast | None) -> Tokens:
    file = Path(text).expanduser()
    if text in PUBLIC_TEXTS and not file.exists():
        return integer_ids(encode(tokenizer, public_text(text, use, tokenizer)))
    if not file.exists():
        raise SpqrError(f"{text} is neither a file nor one of {', '.join(PUBLIC_TEXTS)}")
    return _kind(text).read(file, tokenizer)


def _kind(text: str) -> Kind:
    return KINDS.get(Path(text).suffix.lower(), TEXT)
