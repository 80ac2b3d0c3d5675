"""Texts as the commands take them: files of each kind, several of them, and names of public sets."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from pyarrow import parquet

from spqr_jax.cli.calibration import calibration_tokens, running_text
from spqr_jax.cli.public_texts import DOCUMENTS, PUBLIC_TEXTS, Use
from spqr_jax.cli.text_files import read_text
from spqr_jax.cli.texts import evaluation_tokens
from spqr_jax.texts import random_windows

TOKENIZER = byte_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHARED_CHAT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
RENDERED = "<user>Why?<assistant>So."


def text_of(*files: Path | str) -> str:
    return TOKENIZER.decode(evaluation_tokens(TOKENIZER, [str(file) for file in files], None, 8))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_text(mark: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(f"{mark}Caf\xe9\r\nau lait\r".encode())
    assert read_text(tmp_path / "a.txt") == "Caf\xe9\nau lait\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Caf\xe9 au lait".encode("latin-1"), "byte 0xe9 at offset 3, perhaps in Windows-1252"),
        ("\u201cCaf\xe9 au lait\u201d".encode("cp1252"), "byte 0x93 at offset 0, perhaps in Windows-1252"),
        ("\u3053\u3093\u306b\u3061\u306f".encode("shift-jis"), "byte 0x82 at offset 0: convert it"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442".encode("cp1251"), "at offset 0: convert it"),
        ("Caf\xe9 au lait".encode("utf-16"), "in UTF-16, not in UTF-8"),
        ("Caf\xe9 au lait".encode("utf-16-le"), "in UTF-16LE, not in UTF-8"),
        ("Caf\xe9 au lait".encode("utf-16-be"), "in UTF-16BE, not in UTF-8"),
        ("Caf\xe9 au lait".encode("utf-32"), "in UTF-32, not in UTF-8"),
        (b"PK\x03\x04abc\0\0def\0", "zero byte at offset 7"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding_is_named(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is .*{message}"):
        text_of(tmp_path / name)


def lines(*rows: object) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (lines({"text": "a"}, {"n": 1, "text": "b"}), "a\n\nb"),
        (lines({"text": "a"}) + "\n \r\n" + lines({"content": "b"}), "a\n\nb"),
        (json.dumps({"text": "a"}), "a"),
        (json.dumps([{"text": "a"}, {"text": "b"}], indent=1), "a\n\nb"),
        ('\ufeff{"text": "a"}\r\n{"text": "b\u2028c"}', "a\n\nb\u2028c"),
        (lines({"messages": CHAT}), RENDERED),
        (lines({"conversations": SHARED_CHAT, "id": 3}), RENDERED),
        (lines({"text": "a"}, {"conversation": CHAT}), f"a\n\n{RENDERED}"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson"])
def test_rows_of_json(content: str, text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert text_of(tmp_path / name) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("The sky is blue.", "line 1: not JSON"),
        ("[" * 99_999, "not JSON"),
        ("", "has no rows"),
        ("[]", "has no rows"),
        ('"a"\n', "row 1 is str"),
        ('{"text": "a"}\n{"url": "b", "id": 2}\n', "row 2 has the columns url, id"),
        ("{}", r"row 1 has the columns \(none\)"),
        ('{"text": null}', "row 1 has text of type NoneType"),
        ('{"text": ["a"]}', "row 1 has text of type list"),
        ('{"messages": "a"}', "row 1, messages must be a list of messages"),
        ('{"messages": []}', "row 1, messages must be a list of messages"),
        ('{"messages": ["a"]}', "row 1, messages must be a list of messages"),
    ],
)
def test_rows_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{message}"):
        text_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "row 1, messages needs a chat template"),
        ("{{ raise_exception('no user') }}", "cannot be rendered by the chat template: no user"),
        ("{{ messages[0].content + 1 }}", "cannot be rendered by the chat template"),
        ("{% for %}", "cannot be rendered by the chat template"),
    ],
)
def test_messages_that_cannot_be_rendered(template: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"messages": CHAT}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        evaluation_tokens(tokenizer, [str(tmp_path / "a.jsonl")], None, 8)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"url": ["u", "v"], "text": ["a", "b"]}, "a\n\nb"),
        ({"content": ["a"]}, "a"),
        ({"prompt": ["p"], "messages": [CHAT]}, RENDERED),
        ({"conversations": [SHARED_CHAT]}, RENDERED),
    ],
)
def test_rows_of_parquet(columns: dict, text: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert text_of(tmp_path / "a.parquet") == text


def test_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table({"url": ["u"]}), tmp_path / "url.parquet")
    (tmp_path / "damaged.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"url\.parquet has the columns url, but a text is in one of text, content"):
        text_of(tmp_path / "url.parquet")
    with pytest.raises(ValueError, match=r"damaged\.parquet cannot be read as Parquet"):
        text_of(tmp_path / "damaged.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pyarrow"):
        text_of(tmp_path / "url.parquet")


def test_several_texts_are_joined_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The sky. ")
    (tmp_path / "b.jsonl").write_text(lines({"text": "The sea."}))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert text_of(*files) == "The sky. The sea."
    ids = TOKENIZER.encode("The sky. The sea.", add_special_tokens=False)
    np.testing.assert_array_equal(running_text(TOKENIZER, files), ids)
    np.testing.assert_array_equal(calibration_tokens(TOKENIZER, files, 3, 8, 5), random_windows(ids, 3, 8, 5))


def test_files_of_token_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The sky. ")
    ids = np.arange(32)
    for name, shape in {"two": (2, 8), "one": (1, 8), "long": (1, 32), "other": (4, 4)}.items():
        np.save(tmp_path / f"{name}.npy", ids[: shape[0] * shape[1]].reshape(shape))

    def tokens(*names: str, length: int = 8) -> np.ndarray:
        return calibration_tokens(None, [str(tmp_path / name) for name in names], 3, length, 0)

    np.testing.assert_array_equal(tokens("two.npy", "one.npy"), [ids[:8], ids[8:16], ids[:8]])
    np.testing.assert_array_equal(tokens("one.npy"), [ids[:8]])
    np.testing.assert_array_equal(tokens("long.npy"), random_windows(ids, 3, 8))
    np.testing.assert_array_equal(tokens("long.npy", length=32), [ids])
    with pytest.raises(ValueError, match=r"tokens of shapes \[2, 8\], \[4, 4\]"):
        tokens("two.npy", "other.npy")
    with pytest.raises(ValueError, match=r"tokens of shapes \[9\], \[2, 8\]"):
        calibration_tokens(TOKENIZER, [str(tmp_path / "a.txt"), str(tmp_path / "two.npy")], 3, 8, 0)
    np.testing.assert_array_equal(evaluation_tokens(None, [str(tmp_path / "two.npy")], None, 8), ids[:16])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is asked of the hub, whose sets all have twice as many rows as one use takes."""
    calls = []

    def load_dataset(path: str, **options: object) -> list[dict]:
        calls.append((path, options))
        return [{"text": str(i)} for i in range(2 * DOCUMENTS)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda path, timeout: None)
    return calls


@pytest.mark.parametrize("name", PUBLIC_TEXTS)
def test_uses_of_a_public_text_share_no_documents(name: str, asked: list) -> None:
    running_text(TOKENIZER, [name])
    measured = text_of(name).split("\n\n")
    (path, calibration), (same, measure) = asked
    assert path == same
    assert calibration["streaming"]
    assert calibration != measure or measured == [str(i) for i in range(DOCUMENTS, 2 * DOCUMENTS)]


def test_a_file_of_a_public_name_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c4").write_text("The sky.")
    assert text_of("c4") == "The sky."


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    with pytest.raises(ValueError, match=r"allenai/c4 cannot be read by datasets: \w+: .*look at the network"):
        running_text(TOKENIZER, ["c4"])


def test_a_text_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="wikitext is neither a file nor one of wikitext2, c4, pajama"):
        running_text(TOKENIZER, ["wikitext"])


def test_uses_are_two() -> None:
    assert all(set(text.parts) == set(Use) for text in PUBLIC_TEXTS.values())
