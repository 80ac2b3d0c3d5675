"""Mixtures of experts: every token is multiplied by the matrices of its experts, however the weights are stored."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import LOGITS, TOKENS, random_params
from helpers.tiny_experts import tiny_experts
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import SpqrTensor, spqr_dequantize
from pallas_kernels.format.stacks import element
from spqr_jax import fuse_projections, generate
from spqr_jax.generation import for_decoding
from spqr_jax.models.experts import MOST_ROWS, experts_linear, group_rows, route
from spqr_jax.models.row_major import RowMajor
from spqr_jax.models.stacked_blocks import level_blocks, stack_blocks, unstack_blocks
from spqr_jax.models.unpacked import for_measuring, in_rows

MODEL = tiny_experts(5)
PARAMS = random_params(MODEL)


GROUP = jax.jit(group_rows, static_argnums=1)


@given(st.sampled_from([1, 3, 8]), st.sampled_from([1, 7, 40]), st.data())
def test_every_row_has_one_place_in_a_group_of_its_expert(experts: int, rows: int, data: st.DataObject) -> None:
    chosen = np.array(data.draw(st.lists(st.integers(0, experts - 1), min_size=rows, max_size=rows)))
    groups = jax.tree.map(np.asarray, GROUP(jnp.asarray(chosen), experts))
    assert groups.rows.shape[1] <= MOST_ROWS
    count = len(chosen)
    np.testing.assert_array_equal(groups.rows.reshape(-1)[groups.places], np.arange(count))
    assert np.sum(groups.rows < count) == count
    of_places = np.repeat(groups.experts, groups.rows.shape[1])
    np.testing.assert_array_equal(of_places[groups.places], chosen)


def test_rows_that_all_choose_one_expert_find_room() -> None:
    for expert in range(4):
        groups = GROUP(jnp.full(1000, expert), 4)
        assert int(jnp.sum(groups.rows < 1000)) == 1000


@pytest.mark.parametrize("normalize", [True, False])
def test_routing(normalize: bool) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 7, 6))
    chosen, weights = route(jnp.asarray(logits, jnp.bfloat16), 3, normalize=normalize)
    logits = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    best = np.sort(probabilities, axis=-1)[..., :-4:-1]
    np.testing.assert_allclose(np.take_along_axis(probabilities, np.asarray(chosen), -1), best)
    expected = best / best.sum(axis=-1, keepdims=True) if normalize else best
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def kernels() -> dict[str, Any]:
    """The matrices of five experts in every form."""
    packed = PARAMS["layers_0"]["up_proj"]["kernel"]
    dense = jnp.stack([spqr_dequantize(element(packed, index)) for index in range(5)])
    return {"packed": packed, "dense": dense.swapaxes(1, 2), "rows": RowMajor(dense * 4, jnp.full((5, 64), 4.0))}


@pytest.mark.parametrize("form", ["packed", "dense", "rows"])
@pytest.mark.parametrize("each", [True, False], ids=["an input for each choice", "one for all"])
def test_products_are_those_of_each_choice_alone(form: str, each: bool) -> None:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 4, (2, 9, 2))  # none chooses the last
    x = rng.standard_normal((2, 9, 2, 64) if each else (2, 9, 1, 64)).astype(np.float32)
    found = experts_linear(jnp.asarray(x if each else x[:, :, 0]), kernels()[form], jnp.asarray(chosen))
    weights = np.asarray(kernels()["dense"], np.float64)[chosen]
    expected = np.einsum("btki,btkio->btko", np.broadcast_to(x, (2, 9, 2, 64)), weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_all_forms_of_the_parameters_give_the_same_logits() -> None:
    expected = LOGITS(MODEL, PARAMS, TOKENS)
    fused = fuse_projections(PARAMS, MODEL)
    assert fused["layers_1"]["gate_proj+up_proj"]["kernel"].stack == (5,)
    stacked = stack_blocks(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), PARAMS)
    forms = {
        "fused": fused,
        "stacked": stacked,
        "fused, stacked": stack_blocks(fused),
        "stacked, fused": fuse_projections(stacked, MODEL),
        "level": level_blocks(fused),
        "measured": for_measuring(PARAMS, "unpacked"),
        "in rows": in_rows(PARAMS, MODEL),
        "fused, in rows": in_rows(fused, MODEL),
    }
    for name, params in forms.items():
        tolerance = 2e-3 if "rows" in name else 1e-5
        np.testing.assert_allclose(
            LOGITS(MODEL, params, TOKENS), expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.slow
def test_the_experts_that_a_token_goes_to_change_its_logits() -> None:
    """Otherwise the tests above could not fail."""
    router = PARAMS["layers_0"]["router"]["kernel"]
    changed = {**PARAMS, "layers_0": {**PARAMS["layers_0"], "router": {"kernel": router[:, ::-1]}}}
    difference = np.abs(LOGITS(MODEL, changed, TOKENS) - LOGITS(MODEL, PARAMS, TOKENS))
    assert difference.max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["packed", "unpacked"])
def test_generated_tokens_are_those_of_whole_passes(memory: str) -> None:
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    texts = generate(MODEL, for_decoding(MODEL, PARAMS, memory), prompts, max_new_tokens=4)
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = [*prompt, *text]
        logits = LOGITS(MODEL, PARAMS, np.array([tokens + [0] * (9 - len(tokens))]))[0]
        assert list(text) == np.argmax(logits, axis=-1)[len(prompt) - 1 : len(tokens) - 1].tolist()


def test_a_packed_stack_has_the_sizes_of_its_matrices() -> None:
    packed = PARAMS["layers_0"]["down_proj"]["kernel"]
    assert isinstance(packed, SpqrTensor)
    assert (packed.stack, packed.shape, packed.size) == ((5,), (64, 32), 5 * 64 * 32)
