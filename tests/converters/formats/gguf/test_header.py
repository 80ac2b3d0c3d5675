"""Metadata and places of tensors in GGUF files: as the `gguf` package reads them, and damaged in every way."""

import contextlib
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.tiny_models import random_tensors, tiny_config, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters import ConversionError, from_pretrained
from converters.formats.gguf.file import open_gguf

STRING, ARRAY, UINT8, UINT32, INT32, FLOAT32 = 8, 9, 0, 4, 5, 6
F32, Q4_1 = 0, 3


def message(path: Path) -> str:
    with pytest.raises(ConversionError) as raised:
        from_pretrained(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def text(content: str | bytes) -> bytes:
    encoded = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(encoded)) + encoded


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(shape: tuple[int, ...], kind: int = F32, offset: int = 0, name: str = "x") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def write(path: Path, *parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, alignment: int = 32) -> Path:
    """A GGUF file byte by byte; its tensors are to be cut from 0.0, 1.0, … 15.0."""
    content = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    path.write_bytes(content + bytes(-len(content) % alignment) + np.arange(16, dtype="<f4").tobytes())
    return path


def test_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    config = tiny_config(attention_bias=True)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "é", "", "▁a"],
        "tokenizer.ggml.scores": [0.0, -1.5, -2.5, -1e30],
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
        "tokenizer.ggml.add_bos_token": False,
    }
    path = write_gguf(
        tmp_path / "model.gguf", config, random_tensors(config), kind=gguf.GGMLQuantizationType.Q8_0, metadata=metadata
    )
    file, reader = open_gguf(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert dict(file.metadata) == fields
    assert {name: type(value) for name, value in file.metadata.items()} == {n: type(v) for n, v in fields.items()}
    assert list(file.tensors) == [entry.name for entry in reader.tensors]
    for entry in reader.tensors:
        stored = file.tensors[entry.name]
        assert (stored.shape, stored.kind) == (tuple(reversed(entry.shape.tolist())), entry.tensor_type.name)
        np.testing.assert_array_equal(stored.read(), gguf.dequantize(entry.data, entry.tensor_type))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"split.count": "two"}, "split.count is not of type int"),
        ({"llama.block_count": [2, 3]}, "block_count"),
        ({"llama.block_count": "2"}, "block_count"),
        ({"llama.block_count": 2.0}, "block_count"),
        ({"llama.block_count": 2_000_000_000}, "2000000000 blocks, but .* has 21 tensors"),
        ({"llama.block_count": 4_000_000_000}, r"block_count must be a positive integer below 2\^31, found 4000000000"),
        ({"llama.embedding_length": ["64"]}, "embedding_length"),
        ({"llama.rope.freq_base": "10000"}, "rope.freq_base"),
        ({"llama.rope.freq_base": [1.0, 2.0]}, "rope.freq_base"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": 5}, "tokens is not a list"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [1, 2]}, "tokens is not a list"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [1, 2]}, "merges is not a list"),
        ({"tokenizer.ggml.model": 1}, "tokenizer.ggml.model is not of type str"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "tokenizer.ggml.model is not of type str"),
        ({"tokenizer.ggml.pre": ["gpt2"]}, "tokenizer.ggml.pre is not of type str"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is not of type str"),
        ({"tokenizer.ggml.bos_token_id": "<s>"}, "bos_token_id is not of type int"),
        ({"tokenizer.ggml.scores": ["0"]}, "scores is not a list"),
        ({"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [1.0]}, "scores has 1 entries for 2 tokens"),
        (
            {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1, 1]},
            "token_type has 2 entries for 1 tokens",
        ),
    ],
)
def test_metadata_of_another_type(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_config(), random_tensors(tiny_config()), metadata=metadata)
    assert re.search(named, message(path))


HUGE = 2**63 - 1


@pytest.mark.parametrize(
    ("parts", "counts", "named"),
    [
        ([key("general.architecture", UINT32, bytes(4))], {"keys": 1}, "general.architecture is not of type str"),
        ([key("general.architecture", ARRAY, array(STRING, 0, b""))], {"keys": 1}, "is not of type str"),
        ([key("general.alignment", UINT32, bytes(4))], {"keys": 1}, "general.alignment is 0"),
        ([key("general.alignment", STRING, text("32"))], {"keys": 1}, "general.alignment is '32'"),
        ([key("a", 99, bytes(4))], {"keys": 1}, "99"),
        ([key("a", ARRAY, array(99, 1, bytes(4)))], {"keys": 1}, "99"),
        ([key("a", ARRAY, array(ARRAY, 1, array(UINT8, 1, b"1")))], {"keys": 1}, "lists of lists"),
        ([key("a", ARRAY, array(FLOAT32, HUGE, bytes(4)))], {"keys": 1}, "cannot be metadata"),
        ([key("a", ARRAY, array(UINT8, 1000, bytes(4)))], {"keys": 1}, "it ends after"),
        ([key("a", ARRAY, array(STRING, HUGE, bytes(8)))], {"keys": 1}, "cannot be metadata"),
        ([key("a", ARRAY, array(STRING, 2**25, bytes(8)))], {"keys": 1}, "cannot be metadata"),
        ([key("a", STRING, struct.pack("<Q", HUGE))], {"keys": 1}, "cannot be metadata"),
        ([key("a", STRING, text(b"\xff"))], {"keys": 1}, "utf-8"),
        ([key("a", UINT8, b"1")] * 2, {"keys": 2}, "a occurs twice"),
        ([], {"keys": HUGE}, "cannot be metadata"),
        ([], {"tensors": HUGE}, "0 dimensions"),
        ([tensor((8,))] * 2, {"tensors": 2}, "x occurs twice"),
        ([tensor((1,) * 5)], {"tensors": 1}, "5 dimensions"),
        ([tensor(())], {"tensors": 1}, "0 dimensions"),
        ([tensor((8,), kind=999)], {"tensors": 1}, "999"),
        ([tensor((33, 2), kind=Q4_1)], {"tensors": 1}, "x has 33 features"),
        ([tensor((17,))], {"tensors": 1}, "x ends at byte"),
        ([tensor((8,), offset=64)], {"tensors": 1}, "x ends at byte"),
        ([tensor((8,), offset=2**64 - 32)], {"tensors": 1}, "x ends at byte"),
        ([tensor((2**32, 2**32))], {"tensors": 1}, "x ends at byte"),
        ([tensor((2**63, 2))], {"tensors": 1}, "x ends at byte"),
        ([], {"version": 1}, "version 1"),
        ([], {"version": 0x03000000}, "other order"),
    ],
)
def test_damage(tmp_path: Path, parts: list[bytes], counts: dict[str, int], named: str) -> None:
    assert re.search(named, message(write(tmp_path / "model.gguf", *parts, **counts)))


@pytest.mark.parametrize("alignment", [32, 256])
@pytest.mark.parametrize("version", [2, 3])
def test_what_lies_in_the_file_is_read(tmp_path: Path, alignment: int, version: int) -> None:
    """The cases above differ from this one by their damage only."""
    keys = [key("general.alignment", UINT32, struct.pack("<I", alignment)), key("k", INT32, struct.pack("<i", -3))]
    entries = [tensor((8,), name="a"), tensor((4, 2), offset=32, name="b"), tensor((32,), Q4_1, offset=44, name="c")]
    path = write(tmp_path / "model.gguf", *keys, *entries, keys=2, tensors=3, version=version, alignment=alignment)
    file = open_gguf(path)
    assert file.metadata == {"general.alignment": alignment, "k": -3}
    np.testing.assert_array_equal(file.tensors["a"].read(), np.arange(8))
    np.testing.assert_array_equal(file.tensors["b"].read(), np.arange(8, 16).reshape(2, 4))
    assert file.tensors["c"].read().shape == (32,)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = tiny_config(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=4)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
    }
    tensors = {**random_tensors(config), "rope_freqs.weight": np.ones(1, np.float32)}
    return write_gguf(tmp_path_factory.mktemp("whole") / "model.gguf", config, tensors, metadata=metadata).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    """Nothing but a model or a ConversionError comes of a file whose header is damaged."""
    content = bytearray(whole)
    header = len(whole) - 4 * 8 * 8
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ConversionError):
        from_pretrained(path)
