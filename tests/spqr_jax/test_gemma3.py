"""A second real model, against figures taken with other implementations."""

import hashlib

import numpy as np
import pytest

from converters import Pretrained, find_gemma3, from_pretrained
from spqr_jax import perplexity
from spqr_jax.texts import wikitext2


@pytest.fixture(scope="module")
def gemma3() -> Pretrained:
    return from_pretrained(find_gemma3(), dtype=np.float32)


def encode(pretrained: Pretrained, split: str) -> np.ndarray:
    assert pretrained.tokenizer is not None
    return np.array(
        pretrained.tokenizer(wikitext2(split), add_special_tokens=False, verbose=False)["input_ids"], np.int32
    )


@pytest.mark.slow
def test_texts_have_the_token_ids_of_transformers(gemma3: Pretrained) -> None:
    """The digests are those of ids that the tokenizer gives which transformers makes from the same file."""
    digests = {split: hashlib.sha256(encode(gemma3, split).tobytes()).hexdigest()[:16] for split in ("test", "valid")}
    assert digests == {"test": "cef1fb6d116e83ab", "valid": "89580d8b2506a003"}


@pytest.mark.slow
def test_perplexity_is_that_of_pytorch(gemma3: Pretrained) -> None:
    """18.8802 is what transformers' model gives in float32 on these windows: 1,023 tokens, each behind a BOS."""
    model, params, _ = gemma3
    assert model.first_token == 2
    measured = perplexity(model, params, encode(gemma3, "test"), max_windows=4)
    assert measured == pytest.approx(18.8802, rel=1e-3)
