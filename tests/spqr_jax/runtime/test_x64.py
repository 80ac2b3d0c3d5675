"""Results do not depend on JAX_ENABLE_X64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint

from converters import Pretrained, from_pretrained, open_pretrained
from spqr_jax import SpqrConfig, generate, load, perplexity, quantize, quantize_checkpoint
from spqr_jax.generation import stream
from spqr_jax.runtime.x64 import steps_in_32_bits
from spqr_jax.storage.digests import digest

CONFIG = tiny_config(num_hidden_layers=1)
TOKENS = np.random.default_rng(0).integers(0, 96, (4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("x64") / "model", CONFIG, random_tensors(CONFIG))


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> Pretrained:
    return from_pretrained(checkpoint)


def both(compute: Callable[[], Any]) -> list[Any]:
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            results.append(compute())
    return results


@pytest.mark.parametrize("tokens", [pytest.param(TOKENS, marks=pytest.mark.slow), None])
def test_quantizing(tiny: Pretrained, tokens: np.ndarray | None) -> None:
    config = SpqrConfig() if tokens is not None else SpqrConfig(outlier_threshold=None)
    first, second = both(lambda: quantize(tiny.params, tokens, model=tiny.model, config=config)[0])
    assert digest(jax.tree.map(np.asarray, first)) == digest(jax.tree.map(np.asarray, second))


@pytest.mark.slow
def test_quantizing_from_disk_to_disk(checkpoint: Path, tmp_path: Path) -> None:
    source, names = open_pretrained(checkpoint), iter("ab")
    both(lambda: quantize_checkpoint(source, tmp_path / next(names), TOKENS, config=SpqrConfig()))
    assert digest(load(tmp_path / "a").params) == digest(load(tmp_path / "b").params)


def test_generating(tiny: Pretrained) -> None:
    options = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 2**40 + 5}
    first, second = both(lambda: generate(tiny.model, tiny.params, [[1, 2, 3], [4]], **options))
    assert first == second


def test_measuring(tiny: Pretrained) -> None:
    first, second = both(lambda: perplexity(tiny.model, tiny.params, TOKENS.reshape(-1), window=32))
    assert first == second


@pytest.mark.slow
def test_a_forward_pass_with_a_cache(tiny: Pretrained) -> None:
    """In a program of float64, which calls the model itself."""

    def logits() -> jax.Array:
        cache = tiny.model.init_cache(tiny.params, 4, 64)
        return tiny.model.apply({"params": tiny.params}, jnp.asarray(TOKENS), cache=cache)[0]

    first, second = both(logits)
    assert first.dtype == second.dtype == jnp.float32
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-4)


def test_between_two_steps_the_setting_is_the_callers(tiny: Pretrained) -> None:
    with jax.enable_x64(True):
        for _ in stream(tiny.model, tiny.params, [[1]], max_new_tokens=2):
            assert jnp.arange(2).dtype == jnp.int64


def test_an_error_between_two_steps_leaves_the_setting() -> None:
    def numbers():
        yield jnp.arange(2).dtype
        raise KeyError

    with jax.enable_x64(True):
        steps = steps_in_32_bits(numbers)()
        assert next(steps) == jnp.int32
        with pytest.raises(KeyError):
            next(steps)
        assert jnp.arange(2).dtype == jnp.int64
