"""The real model and the package's texts, against figures taken with other implementations."""

import hashlib
from importlib.resources import files

import numpy as np
import pytest

from converters import Pretrained, find_smollm2, from_pretrained
from spqr_jax import perplexity
from spqr_jax.texts import REFERENCE_STARTS, random_windows, wikitext2, windows_at


@pytest.fixture(scope="module")
def smollm2() -> Pretrained:
    return from_pretrained(find_smollm2(), dtype=np.float16)


def encode(pretrained: Pretrained, text: str) -> np.ndarray:
    assert pretrained.tokenizer is not None
    return np.array(pretrained.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()[:16]


@pytest.mark.slow
def test_texts_have_the_token_ids_of_transformers(smollm2: Pretrained) -> None:
    """The digests are those of ids that transformers made with PyTorch from the same texts."""
    test = encode(smollm2, wikitext2("test"))
    assert digest(test[: 40 * 1024]) == "22cef1d6b21b7d51"
    calibration = windows_at(encode(smollm2, wikitext2("valid")), np.array(REFERENCE_STARTS), 512)
    assert digest(calibration) == "01a923170f1e805f"


def test_texts_are_small() -> None:
    data = files("spqr_jax").joinpath("data")
    assert sum(len(path.read_bytes()) for path in data.iterdir() if path.is_file()) < 1_000_000


def test_random_windows_are_pieces_of_the_text_and_follow_the_seed() -> None:
    tokens = np.arange(1000)
    windows = random_windows(tokens, sequences=50, length=100, seed=1)
    assert windows.shape == (50, 100)
    assert (np.diff(windows, axis=1) == 1).all()
    assert windows.min() >= 0
    assert windows.max() < 1000
    np.testing.assert_array_equal(windows, random_windows(tokens, sequences=50, length=100, seed=1))
    assert (windows != random_windows(tokens, sequences=50, length=100, seed=2)).any()
    np.testing.assert_array_equal(random_windows(tokens[:100], sequences=1, length=100), [tokens[:100]])
    with pytest.raises(ValueError, match="99 tokens, too few for windows of 100"):
        random_windows(tokens[:99], sequences=1, length=100)


@pytest.mark.slow
def test_perplexity_is_that_of_pytorch(smollm2: Pretrained) -> None:
    """23.0927 is what transformers' model gives on these windows in float32."""
    model, params, _ = smollm2
    measured = perplexity(model, params, encode(smollm2, wikitext2("test")), max_windows=4)
    assert measured == pytest.approx(23.0927, rel=1e-3)
