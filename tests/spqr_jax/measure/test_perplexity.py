import copy
import math

import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, MODEL, log_probabilities, tiny_params

from spqr_jax.measure.perplexity import counted_windows, cut_windows, perplexity, window_losses
from spqr_jax.models.stacked_blocks import stack_blocks
from spqr_jax.models.token_ids import check_vocabulary


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, 1000)


@pytest.fixture(scope="module")
def params():
    return tiny_params(1)


def reference_losses(params, windows):
    """Each window's mean −log softmax(logits)[next token], in float64 and without the library's loss."""
    losses = []
    for window in windows:
        log_p = log_probabilities(params, window)
        losses.append(np.mean([-log_p[i, window[i + 1]] for i in range(len(window) - 1)]))
    return losses


# 300 tokens are more than one part of the head's positions, 16 are fewer.
@pytest.mark.parametrize("window", [300, 16, 2])
def test_perplexity_is_that_of_the_logits(params, tokens, window):
    windows = tokens[: 1000 // window * window].reshape(-1, window)[:5]
    losses = reference_losses(params, windows)
    np.testing.assert_allclose(list(window_losses(MODEL, params, windows)), losses, rtol=1e-6)
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(MODEL, params, tokens, window=window, max_windows=5) == pytest.approx(expected, rel=1e-6)


def test_stacked_parameters_give_the_same_perplexity(params, tokens):
    expected = perplexity(MODEL, params, tokens, window=100)
    assert perplexity(MODEL, stack_blocks(params), tokens, window=100) == expected


def test_losses_come_one_by_one(params, tokens):
    windows = cut_windows(tokens, window=100)
    losses = window_losses(MODEL, params, windows)
    assert next(losses) == pytest.approx(reference_losses(params, windows[:1])[0], rel=1e-6)
    assert len(list(losses)) == 9


def test_windows_follow_each_other_and_the_rest_is_dropped():
    np.testing.assert_array_equal(cut_windows(range(10), window=3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(cut_windows(range(10), window=3, max_windows=2), [[0, 1, 2], [3, 4, 5]])
    assert cut_windows(range(10), window=5).shape == cut_windows(range(10), window=5, max_windows=9).shape == (2, 5)


@pytest.mark.parametrize(("window", "stride", "length"), [(40, 13, 150), (40, 39, 118), (40, 1, 43), (40, 20, 40)])
def test_overlapping_windows_predict_every_token_once(params, tokens, window, stride, length):
    text = tokens[:length]
    windows, counted = counted_windows(text, window=window, stride=stride)
    assert sum(counted) == length - 1
    assert max(counted[1:], default=0) <= stride
    log_losses, position = [], 1
    for start in [*range(0, length - window, stride), length - window]:
        stop = start + window
        log_p = log_probabilities(params, text[start:stop])
        log_losses += [-log_p[t - start - 1, text[t]] for t in range(position, stop)]
        position = stop
    assert len(log_losses) == length - 1
    assert len(windows) == len(counted)
    got = perplexity(MODEL, params, text, window=window, stride=stride)
    assert got == pytest.approx(math.exp(np.mean(log_losses)), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 10, "stride": 10}, "stride is 10, but must be between 1 and 9"),
        ({"window": 10, "stride": 0}, "stride is 0, but must be between 1 and 9"),
        ({"window": 1001}, "the text has 1000 tokens, fewer than one window of 1001"),
        ({"window": 1}, "window is 1, but must be at least 2"),
        ({"window": 10, "max_windows": 0}, "max_windows is 0, but must be at least 1"),
        ({"window": 513}, "a window of 513 tokens exceeds the 512 positions of the model"),
    ],
)
def test_errors_of_sizes(params, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, params, tokens, **options)


@pytest.mark.parametrize("outside", [61, -1])
def test_error_of_an_id_outside_the_vocabulary(params, tokens, outside):
    tokens = np.where(np.arange(1000) == 17, outside, tokens)
    with pytest.raises(ValueError, match=f"token id {outside} is outside the vocabulary of 61 tokens"):
        window_losses(MODEL, params, cut_windows(tokens, window=10))


@pytest.mark.parametrize(
    "ids", [np.full(40, 1.5), np.ones(40, bool), [[1, 2.5], [3] * 40]], ids=["half", "bool", "list"]
)
def test_ids_that_are_no_integers(params, ids):
    with pytest.raises(ValueError, match="token ids are integers, but these have type"):
        perplexity(MODEL, params, ids, window=10)
    with pytest.raises(ValueError, match="token ids are integers, but these have type"):
        check_vocabulary(ids[0] if isinstance(ids, list) else ids, CONFIG.vocab_size)


def test_forms_of_a_text(params, tokens):
    expected = perplexity(MODEL, params, tokens[:40], window=40)
    for same in (tokens[None, :40], tokens[:40].tolist(), [tokens[:3].tolist(), tokens[3:40].tolist()]):
        assert perplexity(MODEL, params, same, window=40) == expected
        assert perplexity(MODEL, params, same, window=40, stride=10) == expected


def test_error_of_a_loss_that_is_not_finite(params):
    broken = copy.deepcopy(params)
    broken["embed_tokens"]["embedding"][7] = np.nan
    losses = window_losses(MODEL, broken, np.array([[1, 2, 3], [4, 7, 6]]))
    assert math.isfinite(next(losses))
    with pytest.raises(ValueError, match="the loss of window 1 is nan"):
        next(losses)
