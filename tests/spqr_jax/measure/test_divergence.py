"""How far predictions are apart, against float64."""

import copy

import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, MODEL, log_probabilities, tiny_params

from spqr_jax.measure.divergence import Divergence, mean_divergence, window_divergences

WINDOWS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 270))
ORIGINAL = tiny_params(1)


def moved(amount: float) -> dict:
    """The parameters of the original with noise on the head."""
    params = copy.deepcopy(ORIGINAL)
    kernel = params["lm_head"]["kernel"]
    kernel += amount * np.random.default_rng(2).standard_normal(kernel.shape, np.float32)
    return params


def test_divergence_is_that_of_the_distributions():
    other = moved(0.1)
    for window, found in zip(WINDOWS, window_divergences(MODEL, ORIGINAL, other, WINDOWS), strict=True):
        log_p, log_q = (log_probabilities(params, window) for params in (ORIGINAL, other))
        assert found.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean(), rel=1e-4)
        assert found.agreement == pytest.approx((log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean())
        assert 0.3 < found.agreement < 1


def test_it_is_not_symmetric_and_grows_with_the_distance():
    def mean(one, other):
        return mean_divergence(list(window_divergences(MODEL, one, other, WINDOWS[:1])))

    near, far = mean(ORIGINAL, moved(0.03)), mean(ORIGINAL, moved(0.3))
    assert 0 < near.kl < far.kl
    assert near.agreement > far.agreement
    assert mean(moved(0.3), ORIGINAL).kl != pytest.approx(far.kl, rel=1e-3)
    assert mean(ORIGINAL, ORIGINAL) == Divergence(pytest.approx(0, abs=1e-6), 1)


def test_errors():
    with pytest.raises(ValueError, match="a window of 513 tokens exceeds the 512 positions"):
        window_divergences(MODEL, ORIGINAL, ORIGINAL, np.zeros((1, 513), int))
    with pytest.raises(ValueError, match="token id 61 is outside the vocabulary"):
        window_divergences(MODEL, ORIGINAL, ORIGINAL, np.full((1, 5), 61))
    broken = moved(np.nan)
    with pytest.raises(ValueError, match="the divergence of window 0 is nan"):
        next(window_divergences(MODEL, ORIGINAL, broken, WINDOWS))
