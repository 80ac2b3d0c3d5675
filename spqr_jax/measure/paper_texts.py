"""The texts on which the GPTQ and SpQR papers measure perplexity, tokenized and cut as their code does.

Source: `datautils.py` of github.com/Vahe1994/SpQR. The data come through Hugging Face's `datasets`.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Int

from pallas_kernels.errors import SpqrError
from spqr_jax.measure.hub import hub_dataset


class Protocol(StrEnum):
    """The papers' texts, and two texts that the GPTQ code later cut in another way."""

    WIKITEXT2 = "wikitext2"
    PTB = "ptb"
    PTB_NEW = "ptb-new"
    C4 = "c4"
    C4_NEW = "c4-new"


C4_WINDOWS = 256
"""Number of windows of C4."""

C4_NEW_DOCUMENTS = 1100
"""Number of documents of C4 that the new protocol joins."""

MOST_DRAWS = 100_000
"""Most documents to draw until one is as long as a window."""


def protocol_tokens(protocol: Protocol, tokenizer: Any, window: int) -> Int[np.ndarray, " tokens"]:
    """Token ids of a protocol's text, to be cut into adjacent windows.

    * wikitext2: the lines of WikiText-2's test text, joined by two newlines.
    * ptb: the sentences of Penn Treebank's validation text, joined by two newlines; ptb-new: of the test text, by
      spaces.
    * c4: 256 windows at random places of random documents of the first part of C4's validation texts, drawn by Python's
      `random` with seed 0; c4-new: the first 1100 documents, joined by spaces, up to 256 windows.

    The tokenizer adds its special tokens at the start of a text.

    Args:
      protocol: the text.
      tokenizer: the model's tokenizer, from transformers.
      window: tokens per window.

    Raises:
      SpqrError: `datasets` is not installed, or no document of C4 is as long as a window.

    Example:
      >>> tokens = protocol_tokens(Protocol.C4, tokenizer, 2048)  # doctest: +SKIP
      >>> perplexity(model, params, tokens, window=2048)  # doctest: +SKIP
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False)["input_ids"]

    match protocol:
        case Protocol.WIKITEXT2:
            ids = encode("\n\n".join(_column("Salesforce/wikitext", "text", name="wikitext-2-raw-v1", split="test")))
        case Protocol.PTB:
            ids = encode("\n\n".join(_penn_treebank("validation")))
        case Protocol.PTB_NEW:
            ids = encode(" ".join(_penn_treebank("test")))
        case Protocol.C4:
            ids = random_document_windows(_c4(), encode, window)
        case Protocol.C4_NEW:
            ids = encode(" ".join(_c4()[:C4_NEW_DOCUMENTS]))[: C4_WINDOWS * window]
    return np.array(ids)


def random_document_windows(documents: Sequence[str], encode: Callable[[str], list[int]], window: int) -> list[int]:
    """Token ids of the protocol c4 on given documents: `C4_WINDOWS` windows at random places.

    Raises:
      SpqrError: no document is as long as a window.

    Example:
      >>> len(random_document_windows([text], tokenizer.encode, 32)) == C4_WINDOWS * 32
      True
    """
    source = random.Random(0)
    drawn = (encode(documents[source.randint(0, len(documents) - 1)]) for _ in itertools.count())
    ids: list[int] = []
    for _ in range(C4_WINDOWS):
        document = next((d for d in itertools.islice(drawn, MOST_DRAWS) if len(d) >= window), None)
        if document is None:
            raise SpqrError(f"none of {MOST_DRAWS:,} documents has {window} tokens: ask for shorter windows")
        # Like the official code, draw no random number for a document of exactly one window.
        start = 0 if len(document) == window else source.randint(0, len(document) - window - 1)
        ids += document[start : start + window]
    return ids


def _penn_treebank(split: str) -> Sequence[str]:
    # The hub's Parquet copy: `datasets` no longer runs the script that reads the original files.
    files = f"hf://datasets/ptb-text-only/ptb_text_only@~parquet/penn_treebank/{split}/0000.parquet"
    return _column("parquet", "sentence", data_files={split: files}, split=split)


def _c4() -> Sequence[str]:
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    return _column("allenai/c4", "text", data_files=files, split="validation")


def _column(path: str, column: str, **options: Any) -> Sequence[str]:
    """Reads one column of a data set of the Hugging Face hub."""
    with hub_dataset(path, **options) as rows:
        return rows[column]
