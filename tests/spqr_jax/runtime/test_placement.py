"""Quantizing on a mesh of eight devices: the bits of one device, and no device with more than its share."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.same import assert_identical
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint
from helpers.trained_models import LENGTH, byte_tokens, calibration_tokens, trained

from converters import open_pretrained
from pallas_kernels.format.bit_layout import unpack_codes
from spqr_jax import SpqrConfig, load, perplexity, quantize
from spqr_jax.models import Falcon, FalconConfig, Llama, LlamaConfig, RotaryConfig
from spqr_jax.quantization.hidden_states import advance, embed, start
from spqr_jax.quantization.moments import moment_sums
from spqr_jax.quantization.solver import quantize_shared
from spqr_jax.runtime.placement import Placement
from spqr_jax.storage.disk_to_disk import quantize_checkpoint

DEVICES = 8
CONFIG = SpqrConfig()
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "mlp_size": 384,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 2,
    "rotary": RotaryConfig(),
}
SMALL = {
    "llama": Llama(LlamaConfig(head_dim=32, **SIZES)),
    "falcon": Falcon(FalconConfig(arrangement="parallel", **SIZES | {"num_kv_heads": 1})),
}
TOKENS = np.random.default_rng(0).integers(0, 256, (32, 64)).astype(np.int32)


@pytest.fixture(scope="module")
def placement() -> Placement:
    return Placement(jax.make_mesh((4, 2), ("x", "y")))


def random_params(model: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1])["params"]

    def draw(leaf: Any) -> np.ndarray:
        return (leaf.shape[0] ** -0.5 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, shapes)


@pytest.mark.devices
def test_the_bits_are_those_of_one_device() -> None:
    model, params = SMALL["falcon"], random_params(SMALL["falcon"])
    expected, report = quantize(params, TOKENS, model=model, config=CONFIG)
    found, reported = quantize(params, TOKENS, model=model, config=CONFIG, mesh=jax.make_mesh((4, 2), ("x", "y")))
    assert_identical(found, expected)
    for matrix, wanted in report.items():
        assert reported[matrix].bits_per_weight == wanted.bits_per_weight
        assert reported[matrix].relative_error == pytest.approx(wanted.relative_error, rel=1e-4)


@pytest.mark.devices
@pytest.mark.parametrize("change", [{"sequential": False, "outlier_threshold": None, "permutation": "identity"}, None])
def test_other_settings_and_round_to_nearest(change: dict[str, Any] | None) -> None:
    model, params = SMALL["llama"], random_params(SMALL["llama"])
    config = dataclasses.replace(CONFIG, **change or {})
    tokens = TOKENS if change else None
    expected, found = (
        quantize(params, tokens, model=model, config=config, mesh=mesh)[0]
        for mesh in (None, jax.make_mesh((DEVICES,), ("data",)))
    )
    assert_identical(found, expected)


@pytest.mark.devices
def test_a_trained_model_keeps_its_codes_and_its_perplexity() -> None:
    # Its blocks have two norms at once, which no other model here has.
    model, params = trained("falcon")
    one, eight = (
        quantize(params, calibration_tokens(), model=model, config=CONFIG, mesh=mesh)[0]
        for mesh in (None, jax.make_mesh((DEVICES,), ("data",)))
    )
    equal = [
        unpack_codes(a.codes, a.in_features) == unpack_codes(b.codes, b.in_features)
        for a, b in zip(_packed(one, model), _packed(eight, model), strict=True)
    ]
    assert sum(int(e.sum()) for e in equal) >= 0.999 * sum(e.size for e in equal)
    found, expected = (perplexity(model, p, byte_tokens("test"), window=LENGTH, max_windows=20) for p in (eight, one))
    assert found == pytest.approx(expected, rel=1e-3)


def _packed(params: dict[str, Any], model: Any) -> list[Any]:
    names = model.new_block().matrices()
    return [params[f"layers_{index}"][name]["kernel"] for index in range(model.config.num_layers) for name in names]


@pytest.mark.devices
def test_a_device_has_its_share_of_weights_and_hessians(placement: Placement) -> None:
    model = SMALL["llama"]
    params = jax.tree.map(lambda leaf: placement.put_parameter(leaf), random_params(model)["layers_0"])
    assert {shard.data.shape for shard in params["up_proj"]["kernel"].addressable_shards} == {(256, 384 // DEVICES)}
    streams = start(embed(model, random_params(model), TOKENS), CONFIG)
    _, moments = advance(model.new_block(), 0, params, params, streams, placement)
    weights = tuple(jax.device_put(params[m]["kernel"].T, placement.along(0)) for m in ("q_proj", "k_proj", "v_proj"))
    packed, dense, _ = quantize_shared(weights, moments["attention_input"].hessian, CONFIG, placement)
    for weight, matrix, tensor in zip(weights, dense, packed, strict=True):
        assert {shard.data.shape for shard in matrix.addressable_shards} == {(len(weight) // DEVICES, 256)}
        for array in tensor.arrays().values():
            assert {shard.data.shape for shard in array.addressable_shards} == {(1, *array.shape[1:])}
            assert len(array) == DEVICES


@pytest.mark.devices
def test_the_compiled_solver_needs_an_eighth_on_each_device(placement: Placement) -> None:
    out, columns = 4096, 128

    def bytes_needed(placement: Placement) -> int:
        weight = jax.ShapeDtypeStruct((out, columns), jnp.float32, sharding=placement.along(0))
        hessian = jax.ShapeDtypeStruct((columns, columns), jnp.float32, sharding=placement.along(None))
        solver = jax.jit(quantize_shared, static_argnames=("config", "placement"))
        analysis = solver.lower((weight,), hessian, CONFIG, placement).compile().memory_analysis()
        return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes

    # Beside it, every device has the Hessian and a few matrices of its size, and sums over sixteen rows.
    shared = 10 * 4 * columns**2 + 2 * 4 * columns * out // 16
    assert bytes_needed(placement) < bytes_needed(Placement()) / DEVICES + shared
    assert shared < bytes_needed(Placement()) / 10


@pytest.mark.devices
def test_the_sum_over_sequences_is_in_the_order_of_one_device(placement: Placement) -> None:
    model = SMALL["llama"]
    params, streams = random_params(model), start(embed(model, random_params(model), TOKENS), CONFIG)
    block, first = model.new_block(), params["layers_0"]
    streams = streams._replace(original={"hidden": 1.1 * streams.quantized["hidden"]})
    after, one = advance(block, 0, first, first, streams)
    shared = jax.tree.map(lambda leaf: placement.put_parameter(leaf), first)
    _, eight = advance(block, 0, shared, shared, streams, placement)
    jax.tree.map(np.testing.assert_array_equal, eight, one)
    x = jnp.asarray(after.quantized["attention_input"]).reshape(1, -1, 256)
    hessian = np.triu(moment_sums(x).hessian)
    np.testing.assert_allclose(np.triu(eight["attention_input"].hessian), hessian, rtol=1e-4, atol=1e-3)
    _, one = advance(block, 1, first, first, after)
    _, eight = advance(block, 1, shared, shared, after, placement)
    assert np.any(one["attention_output"].drift.residual)
    jax.tree.map(np.testing.assert_array_equal, eight, one)


@pytest.mark.devices
def test_from_disk_to_disk(tmp_path: Path) -> None:
    config = tiny_config()
    directory = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    byte_tokenizer().save_pretrained(directory)
    source = open_pretrained(directory, dtype=jnp.float16)
    tokens, mesh = TOKENS[:16] % 96, jax.make_mesh((DEVICES,), ("data",))
    expected, _ = quantize(source.read(), tokens, model=source.model, config=CONFIG, mesh=mesh)
    quantize_checkpoint(source, tmp_path / "out", tokens, config=CONFIG, mesh=mesh, hidden_on_disk=True)
    assert_identical(load(tmp_path / "out").params, expected)


@pytest.mark.devices
def test_what_a_mesh_cannot_do_is_said() -> None:
    model, params, mesh = SMALL["llama"], random_params(SMALL["llama"]), jax.make_mesh((DEVICES,), ("data",))
    message = "20 calibration sequences cannot be shared evenly by 8 devices: give a multiple of 8"
    with pytest.raises(ValueError, match=message):
        quantize(params, TOKENS[:20], model=model, config=CONFIG, mesh=mesh)
    with pytest.raises(ValueError, match="with a mesh, quantize cannot be traced"):
        jax.jit(lambda params: quantize(params, TOKENS, model=model, config=CONFIG, mesh=mesh))(params)


@pytest.mark.devices
def test_rows_of_zeros_fill_up_what_does_not_divide(placement: Placement) -> None:
    rng = np.random.default_rng(3)
    weights = tuple(rng.standard_normal((rows, 96), np.float32) for rows in (48, 160))
    x = rng.standard_normal((500, 96), np.float32)
    expected, dense, _ = quantize_shared(weights, x.T @ x, CONFIG)
    parts, found, _ = quantize_shared(weights, x.T @ x, CONFIG, placement)
    for a, b in zip(found, dense, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for whole, part in zip(expected, parts, strict=True):
        rows = part.codes.shape[2]
        assert part.codes.shape == (DEVICES, 3, rows, 3)
        stacked = np.asarray(part.codes).transpose(1, 0, 2, 3).reshape(3, -1, 3)
        np.testing.assert_array_equal(stacked[:, : whole.shape[0]], whole.codes)
        assert part.outliers.offsets[:, -1].sum() == whole.outliers.offsets[-1]
