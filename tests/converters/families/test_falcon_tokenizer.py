"""The tokenizer of a Falcon's GGUF file, against the way of cutting text in the released tokenizer.json."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from converters.formats.gguf.tokenizer import build_tokenizer

TEXT = (
    "Robert Boulter isn't an English film , television and theatre actor in 1999 @-@ 2008 .\n\n"
    "def f(x):\n\treturn x  + 1   # It'LL do `code` <b>$5^2~|</b>\nPerò, café déjà vu … 東京 🙂 12345.678 42   "
)


def released() -> Tokenizer:
    """The cuts of tiiuae/falcon-7b's tokenizer.json, and merges trained with them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


@pytest.mark.parametrize("text", [TEXT, "a  12345 $...x y", "x`y`  ``z", "½ 1234567 ²³\n\n \n a"])
def test_ids_are_those_of_the_released_tokenizer(text: str) -> None:
    tokenizer = released()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "falcon",
        "tokenizer.ggml.tokens": sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
    }
    ours = build_tokenizer(metadata)
    assert ours.encode(text) == tokenizer.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
