"""Files of tokenizers: as small as they can be, and of the same tokenizer."""

from pathlib import Path

import pytest
from helpers.byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from spqr_jax.storage.tokenizer_files import write_tokenizer

PIECES = [("<unk>", 0.0), ("▁", -1e-30), ("☃", -11.512925464970229), ('"\\\n', -3.5), ("\u2028𝄞", -1e22)]


@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(PIECES, unk_id=0)))],
    ids=["bytes", "numbers and signs"],
)
def test_a_tokenizer_without_blanks_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "small", tokenizer)
    tokenizer.save_pretrained(tmp_path / "large")
    small, large = ((tmp_path / name / "tokenizer.json") for name in ("small", "large"))
    assert small.stat().st_size < 0.7 * large.stat().st_size
    assert Tokenizer.from_file(str(small)).to_str() == Tokenizer.from_file(str(large)).to_str()
