"""Likelihoods of continuations, against forward passes over whole texts, one by one and without a cache."""

from functools import partial

import jax
import numpy as np
import pytest
from helpers import tiny_llama

from pallas_kernels.backends.table import BACKENDS
from spqr_jax import generation
from spqr_jax.measure.likelihood import Likelihood, likelihoods
from spqr_jax.models import Falcon, FalconConfig, Llama

MODEL = tiny_llama.MODEL
PARAMS = tiny_llama.tiny_params(0)
RNG = np.random.default_rng(0)


def random_ids(count: int) -> list[int]:
    return RNG.integers(0, MODEL.config.vocab_size, count).tolist()


SHARED, LONG = random_ids(9), random_ids(200)
PAIRS = [
    (SHARED, random_ids(3)),
    (LONG, random_ids(1)),
    ([7], random_ids(40)),
    (SHARED, random_ids(5)),
    (random_ids(70), random_ids(2)),
    (SHARED, random_ids(1)),
    ([7], random_ids(2)),
    (LONG, random_ids(9)),
    (random_ids(4), random_ids(400)),
]


def in_order(*arguments, **options) -> list[Likelihood]:
    found = dict(likelihoods(*arguments, **options))
    return [found[index] for index in range(len(found))]


@partial(jax.jit, static_argnums=0)
def whole_pass(model, params, tokens):
    return model.apply({"params": params}, tokens)


def expected(model, params, context, continuation) -> Likelihood:
    padded = np.zeros((1, MODEL.config.max_positions), np.int32)
    length = len(context) + len(continuation)
    padded[0, :length] = *context, *continuation
    logits = np.asarray(whole_pass(model, params, padded)[0], np.float64)[len(context) - 1 : length - 1]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own = logs[np.arange(len(continuation)), continuation]
    return Likelihood(own.sum(), bool((logs.argmax(axis=1) == continuation).all()))


def assert_close(found: list[Likelihood], wanted: list[Likelihood]) -> None:
    np.testing.assert_allclose([x.log for x in found], [x.log for x in wanted], rtol=1e-5, atol=1e-4)
    assert [x.greedy for x in found] == [x.greedy for x in wanted]


@pytest.mark.parametrize("batch_size", [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 64))])
def test_likelihoods_are_those_of_whole_passes(batch_size):
    assert_close(in_order(MODEL, PARAMS, PAIRS, batch_size=batch_size), [expected(MODEL, PARAMS, *p) for p in PAIRS])


@pytest.mark.slow
def test_what_greedy_decoding_writes_is_greedy():
    (written,) = generation.generate(MODEL, PARAMS, [SHARED], max_new_tokens=6)
    other = [*written[:-1], (written[-1] + 1) % MODEL.config.vocab_size]
    found = in_order(MODEL, PARAMS, [(SHARED, written), (SHARED, other), ([*SHARED, written[0]], written[1:])])
    assert [x.greedy for x in found] == [True, False, True]


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.slow
def test_falcon(alibi):
    model = Falcon(FalconConfig(61, 32, 48, 2, 4, 1, "parallel", tiny_llama.CONFIG.rotary, alibi=alibi))
    params = tiny_llama.tiny_params(1, model)
    assert_close(in_order(model, params, PAIRS, batch_size=4), [expected(model, params, *pair) for pair in PAIRS])


def test_blocks_with_arrays_of_their_own(monkeypatch):
    """The form that `for_decoding` gives on a GPU."""
    monkeypatch.setattr(generation, "choose", lambda _: BACKENDS["pallas"])
    assert "layers_1" in generation.for_decoding(MODEL, PARAMS)
    assert_close(in_order(MODEL, PARAMS, PAIRS[:4]), [expected(MODEL, PARAMS, *pair) for pair in PAIRS[:4]])


def test_a_context_is_run_once_for_all_its_continuations(monkeypatch):
    widths = []
    cache = Llama.init_cache

    def init_cache(self, params, batch, slots, dtype):
        widths.append((batch, slots))
        return cache(self, params, batch, slots, dtype)

    monkeypatch.setattr(Llama, "init_cache", init_cache)
    jax.clear_caches()
    pairs = [(context, random_ids(3)) for context in (random_ids(30), random_ids(31)) for _ in range(4)]
    assert_close(in_order(MODEL, PARAMS, pairs, batch_size=8), [expected(MODEL, PARAMS, *pair) for pair in pairs])
    assert widths == [(2, 64)]


def test_as_many_tokens_as_there_are_positions_and_one():
    positions = MODEL.config.max_positions
    pair = (random_ids(positions - 1), random_ids(2))
    assert np.isfinite(in_order(MODEL, PARAMS, [pair])[0].log)
    with pytest.raises(ValueError, match=r"context of 512 tokens and a continuation of 2 .* the 513 .* 512 positions"):
        likelihoods(MODEL, PARAMS, [([*pair[0], 1], pair[1])])


def test_no_pairs():
    assert in_order(MODEL, PARAMS, []) == []


@pytest.mark.parametrize(
    ("pairs", "batch_size", "words"),
    [
        ([([1], [2]), ([], [2])], 8, "context of pair 1 has no tokens"),
        ([([1], [])], 8, "continuation of pair 0 has no tokens"),
        ([([1], [61])], 8, "token id 61 is outside the vocabulary of 61"),
        ([([1], [2])], 0, "batch_size is 0"),
    ],
)
def test_errors(pairs, batch_size, words):
    with pytest.raises(ValueError, match=words):
        likelihoods(MODEL, PARAMS, pairs, batch_size=batch_size)


def test_a_likelihood_that_is_not_finite():
    broken = jax.tree.map(lambda leaf: leaf * np.nan, PARAMS)
    with pytest.raises(ValueError, match="continuation of 2 tokens is nan"):
        in_order(MODEL, broken, [([1], [2, 3])])
