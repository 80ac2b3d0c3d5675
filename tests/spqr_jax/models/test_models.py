import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_llama
from helpers.random_packed import packed_of_three_bits
from helpers.same import assert_equal

from pallas_kernels import SpqrTensor, spqr_dequantize
from spqr_jax.models import Llama
from spqr_jax.models.stacked_blocks import level_blocks, stack_blocks, unstack_blocks

CONFIG = replace(tiny_llama.CONFIG, num_layers=3, max_positions=64)
MODEL = Llama(CONFIG)
PACKED_MATRICES = ("q_proj", "down_proj")
DEQUANTIZE = jax.jit(spqr_dequantize)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return tiny_llama.tiny_params(1, MODEL)


@pytest.fixture(scope="module")
def packed(params):
    """Random packed matrices: block i has about 2i percent outliers, so the first has none at all."""
    rng = np.random.default_rng(2)
    result = copy.deepcopy(params)
    for index in range(CONFIG.num_layers):
        block = result[f"layers_{index}"]
        for name in PACKED_MATRICES:
            columns, out = block[name]["kernel"].shape
            block[name]["kernel"] = packed_of_three_bits(rng, out, columns, share=0.02 * index)
    return result


def dense(params):
    """Parameters with every packed matrix as a dense kernel."""
    return jax.tree.map(
        lambda leaf: DEQUANTIZE(leaf).T if isinstance(leaf, SpqrTensor) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, SpqrTensor),
    )


@jax.jit
def logits(params, tokens, **kwargs):
    return MODEL.apply({"params": params}, tokens, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["params", "packed"])
def test_stacked_blocks_give_the_same_logits(kind, tokens, request):
    params = request.getfixturevalue(kind)
    np.testing.assert_allclose(logits(stack_blocks(params), tokens), logits(params, tokens), rtol=1e-5, atol=1e-5)


def test_packed_weights_give_the_logits_of_their_dequantized_values(packed, tokens):
    np.testing.assert_allclose(logits(packed, tokens), logits(dense(packed), tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["params", "packed"])
def test_unstacking_inverts_stacking(kind, request):
    params = request.getfixturevalue(kind)
    stacked = stack_blocks(params)
    assert set(stacked) == {"embed_tokens", "blocks", "norm", "lm_head"}
    assert_equal(unstack_blocks(stacked), params)


def test_stacking_pads_outliers_to_the_most_of_any_block(packed):
    counts = [int(packed[f"layers_{i}"]["q_proj"]["kernel"].outliers.offsets[-1]) for i in range(CONFIG.num_layers)]
    assert counts[0] == 0 < counts[1] < counts[2]
    kernel = stack_blocks(packed)["blocks"]["q_proj"]["kernel"]
    assert kernel.outliers.values.shape == kernel.outliers.columns.shape == (CONFIG.num_layers, counts[2])
    for index, count in enumerate(counts):
        assert not kernel.outliers.values[index, count:].any()
        assert not kernel.outliers.columns[index, count:].any()


def test_matrices_without_outliers_stack(packed):
    kernels = [packed[f"layers_{i}"]["q_proj"]["kernel"] for i in range(CONFIG.num_layers)]
    bare = [replace(kernel, outliers=None) for kernel in kernels]
    layers = {f"layers_{index}": {"kernel": kernel} for index, kernel in enumerate(bare)}
    stacked = stack_blocks(layers)
    assert stacked["blocks"]["kernel"].codes.shape == (CONFIG.num_layers, *bare[0].codes.shape)
    assert_equal(unstack_blocks(stacked), layers)


def test_stacking_twice_and_unstacking_twice_change_nothing(params):
    stacked = stack_blocks(params)
    assert stack_blocks(stacked) is stacked
    assert unstack_blocks(params) is params


def test_blocks_that_differ_are_stacks_of_their_kinds(params, packed):
    mixed = {**params, "layers_1": packed["layers_1"]}
    stacked = stack_blocks(mixed)
    assert stacked["blocks"].kinds[:3] == (0, 1, 0)
    assert_equal(unstack_blocks(stacked), mixed)


def test_stacking_needs_blocks():
    with pytest.raises(ValueError, match="the parameters hold no blocks"):
        stack_blocks({"norm": {"scale": jnp.ones(3)}})


@pytest.mark.parametrize("stacked", [False, True])
def test_cache_gives_the_logits_of_a_whole_pass(params, tokens, stacked):
    params = stack_blocks(params) if stacked else params
    cache = MODEL.init_cache(params, batch=2, slots=16)
    pieces = []
    for piece in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:6], tokens[:, 6:]):
        piece_logits, cache = logits(params, piece, cache=cache)
        pieces.append(piece_logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), logits(params, tokens), rtol=1e-5, atol=1e-5)
    assert cache.length == tokens.shape[1]


def test_single_tokens_attend_to_all_filled_slots_of_a_larger_cache(params):
    """Attention over 64, 128 and all 200 slots: before and after each step from one to the next."""
    model = Llama(replace(CONFIG, max_positions=256))
    params, text = stack_blocks(params), np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 131))
    apply = jax.jit(lambda tokens, **options: model.apply({"params": params}, tokens, **options))
    whole = apply(text)
    cache = model.init_cache(params, batch=2, slots=200)
    for start, first in ((0, 62), (66, 126)):
        _, cache = apply(text[:, start:first], cache=cache)
        for index in range(first, first + 4):
            one, cache = apply(text[:, index : index + 1], cache=cache)
            np.testing.assert_allclose(one[:, 0], whole[:, index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_does_not_change_logits(params, tokens, cached):
    padding = 5
    mask = np.ones(tokens.shape, bool)
    mask[1, :padding] = False
    cache = MODEL.init_cache(params, batch=2, slots=16) if cached else None
    result = logits(params, tokens, mask=mask, cache=cache)
    together = result[0] if cached else result
    for row, start in ((0, 0), (1, padding)):
        alone = logits(params, tokens[row : row + 1, start:])
        np.testing.assert_allclose(together[row, start:], alone[0], rtol=1e-5, atol=1e-5)


def test_level_blocks_have_the_arrays_of_the_stack(packed):
    level, stacked = level_blocks(packed), stack_blocks(packed)
    for index in range(CONFIG.num_layers):
        expected = jax.tree.map(lambda array, index=index: array[index], stacked["blocks"])
        assert_equal(level[f"layers_{index}"], expected)
    assert_equal(level_blocks(stacked), level)
    assert_equal(level_blocks(level), level)


def test_only_blocks_of_one_kind_are_padded_to_each_other(params, packed):
    mixed = {**packed, "layers_2": params["layers_2"]}
    level = level_blocks(mixed)
    assert_equal(level["layers_2"], params["layers_2"])
    alike = level_blocks({**packed, "layers_2": packed["layers_0"]})
    assert_equal(level["layers_0"], alike["layers_0"])
