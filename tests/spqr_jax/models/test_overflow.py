"""Activations beyond the range of their type: an error that names the block, in everything that reads logits."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_llama

from pallas_kernels.errors import SpqrError
from spqr_jax.generation import generate, stream
from spqr_jax.measure.continuations import continue_greedily
from spqr_jax.measure.divergence import window_divergences
from spqr_jax.measure.likelihood import likelihoods
from spqr_jax.measure.perplexity import perplexity
from spqr_jax.models.overflow import first_overflow
from spqr_jax.models.precision import computing_type, for_computing
from spqr_jax.models.stacked_blocks import stack_blocks

MODEL = tiny_llama.MODEL
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)
HALF = MODEL.clone(dtype=jnp.float16)


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    """The gated products of the second block pass 65504, and its output is again of the usual size."""
    params = tiny_llama.tiny_params(0)
    block = dict(params["layers_1"])
    for name, scale in (("gate_proj", 300), ("up_proj", 3000), ("down_proj", 1e-6)):
        block[name] = {"kernel": block[name]["kernel"] * np.float32(scale)}
    return params | {"layers_1": block}


def test_only_float16_overflows(large: dict[str, Any]) -> None:
    assert first_overflow(MODEL, large, TOKENS) is None
    assert first_overflow(MODEL.clone(dtype=jnp.bfloat16), large, TOKENS) is None
    for params in (large, stack_blocks(large)):
        assert first_overflow(HALF, params, TOKENS) == "layers_1"


@pytest.mark.parametrize("part", ["embed_tokens", "layers_0", "norm", "head"])
def test_the_first_part_is_named(part: str) -> None:
    params = tiny_llama.tiny_params(0)
    key, module, array = {
        "embed_tokens": ("embed_tokens", None, "embedding"),
        "layers_0": ("layers_0", "q_proj", "kernel"),
        "norm": ("norm", None, "scale"),
        "head": ("lm_head", None, "kernel"),
    }[part]
    holder = params[key] if module is None else params[key][module]
    holder[array] = np.full_like(holder[array], np.nan)
    assert first_overflow(MODEL, params, TOKENS) == part


def use(what: str, params: dict[str, Any]) -> Any:
    match what:
        case "perplexity":
            return perplexity(HALF, params, TOKENS.reshape(-1), window=16)
        case "divergence":
            return list(window_divergences(HALF, tiny_llama.tiny_params(0), params, TOKENS))
        case "likelihood":
            return list(likelihoods(HALF, params, [([1, 2], [3, 4])]))
        case "continuation":
            return continue_greedily(HALF, params, TOKENS[:, :4], 3)
        case "sampling":
            return generate(HALF, params, [[1, 2]], max_new_tokens=3, temperature=1.0)
    return list(stream(HALF, params, [[1, 2], [3]], max_new_tokens=3))


SLOW = [pytest.param(what, marks=pytest.mark.slow) for what in ("continuation", "sampling")]


@pytest.mark.parametrize("what", ["perplexity", "divergence", "likelihood", "stream", *SLOW])
def test_overflow_is_an_error_that_names_the_block(what: str, large: dict[str, Any]) -> None:
    with pytest.raises(
        SpqrError, match="layers_1 is not finite in float16: its numbers end at 65504, so choose dtype bfl"
    ):
        use(what, large)


@pytest.mark.slow
def test_what_a_sequence_computes_after_its_end_is_no_error(large: dict[str, Any]) -> None:
    every = range(61)
    assert generate(MODEL, large, [[1, 2]], max_new_tokens=3, stop_tokens=every) == [[]]
    # The first token is chosen from logits that are not finite, before any end.
    with pytest.raises(SpqrError, match="after prompt 0"):
        generate(HALF, large, [[1, 2]], max_new_tokens=3, stop_tokens=every)


def test_a_cpu_computes_in_a_type_that_holds_every_own_type() -> None:
    for own in ("float16", "bfloat16", "float32"):
        assert computing_type(own, "gpu") == own
        assert jnp.finfo(computing_type(own, "cpu")).max >= jnp.finfo(own).max
    assert for_computing(HALF).config == HALF.config
