"""The table of backends: whoever adds a record to it computes the products of whole models."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import TOKENS, random_params
from helpers.random_packed import random_packed
from helpers.tiny_llama import CONFIG

from pallas_kernels import spqr_dequantize, spqr_matmul
from pallas_kernels.backends import table
from pallas_kernels.backends.backend import Backend
from pallas_kernels.backends.table import BACKENDS, choose
from pallas_kernels.format.bit_layout import unpack_codes
from spqr_jax.generation import for_decoding, generate
from spqr_jax.models import Llama

MODEL = Llama(CONFIG)
MATRICES = 7
"""Of a block; without fusing, each is one product."""
calls: Counter[str] = Counter()


def dequantize(w, dtype):
    calls["dequantize"] += 1
    codes = unpack_codes(w.codes, w.in_features).astype(jnp.float32)
    scale, zero = (jnp.repeat(statistic, w.group_size, axis=1).astype(jnp.float32) for statistic in (w.scale, w.zero))
    weight = scale * (codes - zero)
    if w.outliers is not None:
        weight = weight.at[w.outliers.rows(), w.outliers.columns].add(w.outliers.values.astype(jnp.float32))
    return weight[:, jnp.argsort(w.permutation)].astype(dtype)


def matmul(x, w):
    calls["matmul"] += 1
    return x @ dequantize(w, x.dtype).T


TOY = Backend("toy", "nothing", lambda: True, matmul, dequantize)


@pytest.fixture
def toy(monkeypatch) -> Iterator[Backend]:
    monkeypatch.setattr(table, "BACKENDS", {"toy": TOY, **BACKENDS})
    calls.clear()
    # Programs that were compiled with another backend know nothing of this one.
    jax.clear_caches()
    yield TOY
    jax.clear_caches()


def logits(params):
    return jax.jit(MODEL.apply)({"params": params}, TOKENS)


@pytest.mark.slow
def test_a_whole_model_runs_on_a_new_backend(monkeypatch, request):
    params = random_params(MODEL)
    prompts = [[1, 2, 3], [5]]
    packed = for_decoding(MODEL, params, "packed")
    expected = logits(params), generate(MODEL, packed, prompts, max_new_tokens=6)
    request.getfixturevalue("toy")
    np.testing.assert_allclose(logits(params), expected[0], rtol=1e-4, atol=1e-4)
    assert calls == {"matmul": CONFIG.num_layers * MATRICES, "dequantize": CONFIG.num_layers * MATRICES}
    assert generate(MODEL, packed, prompts, max_new_tokens=6) == expected[1]
    assert calls["matmul"] > CONFIG.num_layers * MATRICES


def test_operations_ask_the_backend_that_is_named(toy):
    packed, x = random_packed(np.random.default_rng(0), 32, 64, stats_bits=None), jnp.ones((2, 64))
    expected = spqr_matmul(x, packed, implementation="xla"), spqr_dequantize(packed, implementation="xla")
    assert not calls
    np.testing.assert_allclose(spqr_matmul(x, packed, implementation="toy"), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spqr_dequantize(packed, implementation="toy"), expected[1], rtol=1e-6, atol=1e-6)
    assert calls == {"matmul": 1, "dequantize": 2}


def test_kernels_get_rules_to_map_and_differentiate(toy, monkeypatch):
    def opaque(x, w):
        return jax.pure_callback(
            lambda x, weight: np.asarray(x) @ np.asarray(weight).T,
            jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[0]), x.dtype),
            x,
            dequantize(w, x.dtype),
        )

    monkeypatch.setitem(table.BACKENDS, "opaque", replace(TOY, name="opaque", matmul=opaque, kernels=True))
    packed, x = random_packed(np.random.default_rng(0), 32, 64, stats_bits=None), jnp.ones((3, 2, 64))

    def results(name):
        def loss(x):
            return (spqr_matmul(x, packed, implementation=name) ** 2).sum()

        return jax.grad(loss)(x), jax.vmap(lambda x: spqr_matmul(x, packed, implementation=name))(x)

    for result, expected in zip(results("opaque"), results("xla"), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_the_first_backend_that_can_serve_is_chosen(monkeypatch):
    first = replace(TOY, name="first", dtypes=("bfloat16",))
    monkeypatch.setattr(table, "BACKENDS", {"first": first, "second": TOY, **BACKENDS})
    assert choose(None) == choose(None, jnp.bfloat16) == first
    assert choose(None, jnp.float32) == TOY
    for other in (replace(first, automatic=False), replace(first, available=lambda: False)):
        monkeypatch.setitem(table.BACKENDS, "first", other)
        assert choose(None, jnp.bfloat16) == TOY


def test_errors_name_the_backend_and_what_it_needs(monkeypatch):
    far = replace(TOY, name="far", needs="a quantum computer", available=lambda: False)
    monkeypatch.setattr(table, "BACKENDS", {"narrow": replace(TOY, dtypes=("float16",)), "far": far})
    with pytest.raises(ValueError, match="implementation is 'xla', but must be 'narrow', 'far' or None"):
        choose("xla")
    with pytest.raises(ValueError, match="implementation='far' needs a quantum computer, but JAX computes on"):
        choose("far")
    with pytest.raises(ValueError, match="implementation='narrow' takes activations in float16, not float32"):
        choose("narrow", jnp.float32)


def test_names_are_those_of_the_records():
    assert list(BACKENDS) == [backend.name for backend in BACKENDS.values()] == ["pallas", "xla", "interpret"]
