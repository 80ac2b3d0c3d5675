"""Packed weights spread over the devices of a mesh: the numbers that one device computes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import LOGITS, random_params
from helpers.random_formats import DEQUANTIZE, OUTLIERS, formats, small_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from converters import ConversionError, export_hf_spqr, export_huggingface
from pallas_kernels import (
    SplitTensor,
    SpqrTensor,
    split_columns,
    split_matmul,
    split_rows,
    spqr_matmul,
)
from pallas_kernels.format.bit_layout import unpack_codes
from pallas_kernels.format.rows import ROW_FIELDS
from pallas_kernels.format.stacks import element, pad, stack
from spqr_jax import CheckpointError, SpqrConfig, fuse_projections, generate, perplexity, quantize, save, shard_params
from spqr_jax.generation import Policy, extend, for_decoding, start
from spqr_jax.models import (
    Decoder,
    Falcon,
    FalconConfig,
    Gemma,
    GemmaConfig,
    Llama,
    LlamaConfig,
    Olmo2,
    Olmo2Config,
    Opt,
    OptConfig,
    Phi3,
    Phi3Config,
    Qwen3Moe,
    Qwen3MoeConfig,
    RotaryConfig,
)
from spqr_jax.models.stacked_blocks import level_blocks, stack_blocks, unstack_blocks

SIZES = {"vocab_size": 64, "hidden_size": 128, "mlp_size": 256, "num_layers": 2, "num_heads": 8, "max_positions": 256}
LLAMA = partial(LlamaConfig, **SIZES, head_dim=16, rotary=RotaryConfig())
FALCON = partial(FalconConfig, **SIZES, rotary=RotaryConfig())
GATED: dict[str, Any] = {**SIZES, "head_dim": 16, "rotary": RotaryConfig()}
MODELS: dict[str, Decoder] = {
    "llama": Llama(LLAMA(num_kv_heads=8)),
    "llama, grouped queries and biases": Llama(LLAMA(num_kv_heads=2, attention_bias=True, mlp_bias=True)),
    "mistral": Llama(LLAMA(num_kv_heads=4), alias="mistral"),
    "falcon, multi-query": Falcon(FALCON(num_kv_heads=1, arrangement="parallel")),
    "falcon, grouped queries": Falcon(FALCON(num_kv_heads=2, arrangement="parallel_two_norms", tie_embeddings=False)),
    "falcon, sequential": Falcon(FALCON(num_kv_heads=8, arrangement="sequential", alibi=True)),
    "olmo2": Olmo2(Olmo2Config(**GATED, num_kv_heads=8)),
    "phi3": Phi3(Phi3Config(**GATED, num_kv_heads=4)),
    "gemma": Gemma(GemmaConfig(**GATED, num_kv_heads=2, window=5, windowed=(True, False))),
    "qwen3 moe": Qwen3Moe(Qwen3MoeConfig(**GATED, num_kv_heads=4, experts=4, experts_per_token=2)),
    "opt": Opt(OptConfig(**SIZES, embedding_size=128, tie_embeddings=False)),
}
UNPACK = jax.jit(unpack_codes, static_argnums=1)
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 12)).astype(np.int32)


def contents(tensor: SpqrTensor) -> dict[str, np.ndarray]:
    """The parts of a matrix, to the bit, its columns or groups along the last axes."""
    out, columns = tensor.shape
    residuals = np.zeros((out, columns), np.float16)
    if tensor.outliers is not None:
        rows = np.repeat(np.arange(out), np.diff(tensor.outliers.offsets))
        residuals[rows, tensor.outliers.columns[: len(rows)]] = tensor.outliers.values[: len(rows)]
    statistics = {name: getattr(tensor, name) for name in ROW_FIELDS if name != "codes"}
    present = {name: array for name, array in statistics.items() if array is not None}
    return {"codes": UNPACK(tensor.codes, columns), "residuals": residuals, **present}


@settings(max_examples=4)
@given(formats(), st.integers(0, 2**32 - 1), st.sampled_from(OUTLIERS), st.sampled_from((1, 3)))
@pytest.mark.slow
def test_split_columns_are_the_columns_that_were(options: dict[str, Any], seed: int, outliers: str, parts: int) -> None:
    tensor = small_matrix(seed, outliers=outliers, **options)
    out, columns = tensor.shape
    split, features = split_columns(tensor, parts)
    assert all(len(array) == parts for array in split.arrays().values())
    pieces = [element(split, index) for index in range(parts)]
    assert {piece.shape for piece in pieces} == {(out, columns // parts)}
    assert {piece.permutation for piece in pieces} == {None}
    assert (features is None) == (tensor.permutation is None)
    if features is not None:
        np.testing.assert_array_equal(np.ravel(features), tensor.permutation)
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=-1), *map(contents, pieces))
    expected = contents(tensor)
    assert joined.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, joined, expected)


@pytest.mark.parametrize(
    ("columns", "parts", "message"),
    [
        (96, 4, "96 input features do not divide into 4 parts of whole groups of 16"),
        (96, 0, "96 input features do not divide into 0 parts"),
    ],
)
def test_columns_that_do_not_divide(columns: int, parts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_columns(small_matrix(0, columns=columns), parts)


def test_a_stack_is_not_split_by_columns() -> None:
    tensor = small_matrix(0)
    with pytest.raises(ValueError, match="a stack of 2 matrices cannot be split by columns"):
        split_columns(stack([tensor, tensor]), 2)


def test_stacks_are_padded_alike() -> None:
    stacks = [
        split_rows(small_matrix(seed, outliers=outliers), 2) for seed, outliers in enumerate(("one row", "everywhere"))
    ]
    padded = pad(stacks)
    assert padded[0].outliers.values.shape == padded[1].outliers.values.shape
    for before, after in zip(stacks, padded, strict=True):
        for index in range(2):
            np.testing.assert_array_equal(DEQUANTIZE(element(after, index)), DEQUANTIZE(element(before, index)))


def is_split(leaf: Any) -> bool:
    return isinstance(leaf, SplitTensor)


def split_leaves(params: Any) -> list[SplitTensor]:
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_split) if is_split(leaf)]


@pytest.fixture(scope="module")
def spread() -> tuple[Decoder, Any]:
    """A model spread over the one device that there is."""
    model = MODELS["llama"]
    return model, shard_params(random_params(model), model, jax.make_mesh((1,), ("model",)))


@pytest.mark.slow
def test_a_mesh_of_one_device(spread: tuple[Decoder, Any]) -> None:
    model, sharded = spread
    params = random_params(model)
    assert len(split_leaves(sharded)) == 14
    expected = perplexity(model, params, TOKENS[0], window=6)
    assert perplexity(model, sharded, TOKENS[0], window=6) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_blocks_are_stacked_and_levelled(spread: tuple[Decoder, Any]) -> None:
    _, sharded = spread
    for form in (unstack_blocks(stack_blocks(sharded)), level_blocks(stack_blocks(sharded)), level_blocks(sharded)):
        assert jax.tree.structure(form) == jax.tree.structure(sharded)
        jax.tree.map(np.testing.assert_array_equal, form, sharded)


def test_split_parameters_are_not_fused(spread: tuple[Decoder, Any]) -> None:
    model, sharded = spread
    assert jax.tree.structure(fuse_projections(sharded, model)) == jax.tree.structure(sharded)


def test_split_parameters_are_not_split_again(spread: tuple[Decoder, Any]) -> None:
    model, sharded = spread
    with pytest.raises(ValueError, match="split over devices already"):
        shard_params(sharded, model, jax.make_mesh((1,), ("model",)))


def test_fused_parameters_are_not_split() -> None:
    model = Llama(LLAMA(num_kv_heads=8))
    fused = fuse_projections(random_params(model), model)
    with pytest.raises(ValueError, match=r"q_proj\+k_proj\+v_proj cannot be split; shard the parameters from before"):
        shard_params(fused, model, jax.make_mesh((1,), ("model",)))


def test_split_parameters_are_not_saved_exported_or_quantized(spread: tuple[Decoder, Any], tmp_path: Path) -> None:
    model, sharded = spread
    with pytest.raises(
        CheckpointError, match="split over devices cannot be saved: save the parameters given to shard_params"
    ):
        save(tmp_path / "saved", model, sharded)
    exports: list[Callable[..., None]] = [export_huggingface, export_hf_spqr]
    for export in exports:
        with pytest.raises(ConversionError, match="split over devices; export those they were made from"):
            export(tmp_path / "exported", model, sharded)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(sharded, TOKENS, model=model, config=SpqrConfig())


def test_features_that_do_not_fit(spread: tuple[Decoder, Any]) -> None:
    for leaf in split_leaves(spread[1]):
        with pytest.raises(ValueError, match=r"x has 5 features, but the weight of shape \(\d+, \d+\) takes"):
            split_matmul(jnp.zeros((2, 5)), leaf)


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.devices
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_products_of_both_ways_to_split_and_their_derivatives(implementation: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 256), np.float32)
    for axis_type, permutation in ((AxisType.Explicit, rng.permutation(256)), (AxisType.Auto, None)):
        mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
        over = NamedSharding(mesh, P("model"))
        w = small_matrix(0, out=128, columns=256, permutation=permutation)
        by_rows = SplitTensor(jax.device_put(split_rows(w, 8), over), None, by="rows", mesh=mesh)
        by_columns = SplitTensor(*jax.device_put(split_columns(w, 8), over), by="columns", mesh=mesh)
        expected = jax.jit(spqr_matmul)(x, w)
        slope = jax.jit(jax.grad(lambda x, w: (spqr_matmul(x, w) ** 2).sum()))(x, w)
        for split in (by_rows, by_columns):
            assert split.shape == w.shape
            product = partial(split_matmul, implementation=implementation)
            y = jax.jit(product)(x, split)
            assert len(y.sharding.device_set) == 8
            assert y.sharding.is_fully_replicated == (split.by == "columns")
            assert_close(y, expected)
            assert_close(jax.jit(jax.grad(lambda x, w, product=product: (product(x, w) ** 2).sum()))(x, split), slope)


@pytest.mark.devices
def test_a_device_holds_an_eighth_of_the_matrices() -> None:
    """But for offsets, permutations and padding."""
    model = Llama(LLAMA(**{"hidden_size": 512, "mlp_size": 2048, "num_layers": 1}, num_kv_heads=8, head_dim=64))
    params = random_params(model)
    sharded = shard_params(params, model, jax.make_mesh((2, 4), ("data", "model")))
    split = split_leaves(sharded)
    assert len(split) == 7
    whole = sum(params["layers_0"][name]["kernel"].nbytes for name in model.new_block().matrices())
    for device in jax.devices():
        shards = [s for leaf in jax.tree.leaves(split) for s in leaf.addressable_shards if s.device == device]
        assert whole / 8 <= sum(shard.data.nbytes for shard in shards) < 1.1 * whole / 8
    for array in (sharded["embed_tokens"]["embedding"], sharded["lm_head"]["kernel"]):
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // 8}


@pytest.mark.devices
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("llama, grouped queries and biases", 8),
        ("falcon, multi-query", 8),
        ("falcon, sequential", 4),
        ("olmo2", 8),
        ("phi3", 4),
        ("gemma", 2),
        ("qwen3 moe", 4),
        ("opt", 4),
    ],
)
def test_devices_compute_what_one_does(name: str, devices: int) -> None:
    """Logits and greedy tokens of a model are those of one device, and each device keeps its heads of the cache."""
    model = MODELS[name]
    params = random_params(model)
    # A bias of the last norm would choose the tokens.
    params["norm"] = jax.tree.map_with_path(
        lambda path, array: np.full_like(array, path[-1].key == "scale"), params["norm"]
    )
    mesh = Mesh(jax.devices()[:devices], "model")
    sharded = shard_params(params, model, mesh)
    blocks = sharded["layers_0"]
    whole_heads = {key for key, count in model.new_block().heads().items() if count % devices}
    assert {key for key in model.new_block().matrices() if not is_split(blocks[key]["kernel"])} == whole_heads
    assert_close(LOGITS(model, sharded, TOKENS), LOGITS(model, params, TOKENS))
    prompts = [TOKENS[0].tolist(), TOKENS[1, :7].tolist()]
    tokens = generate(model, params, prompts, max_new_tokens=12)
    assert len({*tokens[0], *tokens[1]}) > 2, "the parameters are too easy"
    decoding = for_decoding(model, sharded)
    assert generate(model, decoding, prompts, max_new_tokens=12) == tokens
    keys = extend(model, Policy(), decoding, *start(model, decoding, prompts, 12)).cache.blocks["keys"]
    heads = model.config.num_kv_heads
    assert {s.data.shape[2] for s in keys.addressable_shards} == {heads if heads % devices else heads // devices}
    assert len(keys.sharding.device_set) == devices
