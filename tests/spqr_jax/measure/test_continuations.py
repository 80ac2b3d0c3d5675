"""Text that models write, against one forward pass per token."""

import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, MODEL, log_probabilities, tiny_params

from spqr_jax.measure.continuations import agreement_lengths, continuation_perplexity, continue_greedily

PARAMS = tiny_params(1)
PROMPTS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 10))


def test_agreement_ends_at_the_first_difference():
    one = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    other = np.array([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4]])
    np.testing.assert_array_equal(agreement_lengths(one, other), [4, 1, 0])


@pytest.mark.slow
def test_the_likeliest_token_follows():
    written = continue_greedily(MODEL, PARAMS, PROMPTS, 5)
    assert written.shape == (3, 5)
    for prompt, new in zip(PROMPTS, written, strict=True):
        for count, token in enumerate(new):
            log_p = log_probabilities(PARAMS, np.concatenate([prompt, new[:count]]))
            assert token == log_p[-1].argmax()


def test_perplexity_counts_the_continuation_alone():
    new = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 7))
    losses = []
    for prompt, tokens in zip(PROMPTS, new, strict=True):
        log_p = log_probabilities(PARAMS, np.concatenate([prompt, tokens]))
        losses += [-log_p[9 + i, token] for i, token in enumerate(tokens)]
    found = continuation_perplexity(MODEL, PARAMS, PROMPTS, new)
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    own = continue_greedily(MODEL, PARAMS, PROMPTS, 7)
    assert continuation_perplexity(MODEL, PARAMS, PROMPTS, own) < found
