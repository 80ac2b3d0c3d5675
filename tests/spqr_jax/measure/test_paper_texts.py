"""The papers' texts; the hub is replaced by a few sentences."""

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer

from spqr_jax.measure import paper_texts
from spqr_jax.measure.paper_texts import Protocol, protocol_tokens, random_document_windows

TOKENIZER = byte_tokenizer()
LINES = [f"Sentence number {i}" + ", and more" * (i % 7) for i in range(40)]


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the hub, which has the same lines in every column."""
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return {"text": LINES, "sentence": LINES}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@pytest.mark.parametrize(
    ("protocol", "text", "split"),
    [
        (Protocol.WIKITEXT2, "\n\n".join(LINES), "test"),
        (Protocol.PTB, "\n\n".join(LINES), "validation"),
        (Protocol.PTB_NEW, " ".join(LINES), "test"),
    ],
)
def test_texts_that_are_joined(protocol, text, split, asked):
    np.testing.assert_array_equal(protocol_tokens(protocol, TOKENIZER, 8), ids(text))
    ((_, options),) = asked
    assert options["split"] == split
    assert all(split in file for file in options.get("data_files", {}).values())


def test_c4_new_is_cut_after_documents_and_after_windows(asked, monkeypatch):
    assert len(ids(" ".join(LINES))) > 256 * 2
    np.testing.assert_array_equal(protocol_tokens(Protocol.C4_NEW, TOKENIZER, 2), ids(" ".join(LINES))[: 256 * 2])
    monkeypatch.setattr(paper_texts, "C4_NEW_DOCUMENTS", 3)
    np.testing.assert_array_equal(protocol_tokens(Protocol.C4_NEW, TOKENIZER, 900), ids(" ".join(LINES[:3])))


@pytest.mark.parametrize("window", [30, len(ids(LINES[0]))])
def test_c4_draws_as_the_official_code_does(window, asked):
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            document = ids(LINES[random.randint(0, len(LINES) - 1)])
            if len(document) >= window:
                break
        if len(document) == window:
            expected += document
        else:
            start = random.randint(0, len(document) - window - 1)
            expected += document[start : start + window]
    np.testing.assert_array_equal(protocol_tokens(Protocol.C4, TOKENIZER, window), expected)


def test_c4_with_documents_that_are_too_short(monkeypatch):
    monkeypatch.setattr(paper_texts, "MOST_DRAWS", 50)
    with pytest.raises(ValueError, match="none of 50 documents has 500 tokens"):
        random_document_windows(LINES, ids, 500)


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        protocol_tokens(Protocol.WIKITEXT2, TOKENIZER, 8)
