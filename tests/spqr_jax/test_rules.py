"""Settings of single matrices: which rule decides, what rules must be, and models of blocks that differ."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import LOGITS, dense_params

from converters import export_huggingface, from_pretrained
from pallas_kernels import SpqrTensor, spqr_dequantize
from spqr_jax import (
    SpqrConfig,
    fuse_projections,
    generate,
    load,
    perplexity,
    quantize,
    quantize_checkpoint,
    save,
    shard_params,
)
from spqr_jax.generation import for_decoding
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig
from spqr_jax.models.block_kinds import BlockKinds
from spqr_jax.models.stacked_blocks import level_blocks, stack_blocks, unstack_blocks
from spqr_jax.models.unpacked import for_measuring, in_rows
from spqr_jax.quantization.solver import quantize_matrix
from spqr_jax.rules import Plan
from spqr_jax.storage.checkpoint import describe
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import read_record

MODEL = Llama(LlamaConfig(61, 64, 128, 5, 4, 2, 16, RotaryConfig()))
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 32))
CONFIG = SpqrConfig(bits=3, group_size=16, outlier_threshold=0.5)
RULES: Any = [
    ("layers_1.v_proj", {"bits": 8, "group_size": 32}),
    ("layers_[13].*_proj", {"bits": 4, "stats_bits": None}),
    ("*.down_proj", None),
]


PARAMS = dense_params(MODEL)


@pytest.fixture(scope="module")
def mixed() -> dict[str, Any]:
    return quantize(PARAMS, TOKENS, model=MODEL, config=CONFIG, rules=RULES)[0]


def bits(params: dict[str, Any], block: int, name: str) -> int | None:
    kernel = params[f"layers_{block}"][name]["kernel"]
    return kernel.bits if isinstance(kernel, SpqrTensor) else None


@pytest.mark.slow
def test_the_first_rule_that_matches_decides(mixed):
    assert [bits(mixed, block, "v_proj") for block in range(5)] == [3, 8, 3, 4, 3]
    assert [bits(mixed, block, "q_proj") for block in range(5)] == [3, 4, 3, 4, 3]
    assert [bits(mixed, block, "down_proj") for block in range(5)] == [None, 4, None, 4, None]
    kernel = mixed["layers_1"]["v_proj"]["kernel"]
    assert (kernel.group_size, kernel.scale) == (32, None)
    assert mixed["layers_1"]["q_proj"]["kernel"].scale is not None
    np.testing.assert_array_equal(mixed["layers_2"]["down_proj"]["kernel"], PARAMS["layers_2"]["down_proj"]["kernel"])


@pytest.mark.slow
def test_matrices_of_one_input_and_several_settings_are_each_solved_as_alone():
    config = SpqrConfig(bits=3, group_size=16, outlier_threshold=None)
    rules: Any = [("layers_0.k_proj", {"bits": 5}), ("layers_0.v_proj", None)]
    quantized, report = quantize(PARAMS, TOKENS, model=MODEL, config=config, rules=rules)
    plain, _ = quantize(PARAMS, TOKENS, model=MODEL, config=config)
    wide, _ = quantize(PARAMS, TOKENS, model=MODEL, config=SpqrConfig(bits=5, group_size=16, outlier_threshold=None))
    for name, expected in (("q_proj", plain), ("k_proj", wide)):
        found, alone = (tree["layers_0"][name]["kernel"] for tree in (quantized, expected))
        np.testing.assert_array_equal(found.codes, alone.codes)
    assert "layers_0.v_proj" not in report


@pytest.mark.slow
def test_all_forms_of_mixed_blocks_give_the_same_logits(mixed):
    expected = LOGITS(MODEL, mixed, TOKENS)
    stacked = stack_blocks(mixed)
    kinds = stacked["blocks"]
    assert isinstance(kinds, BlockKinds)
    assert (kinds.kinds, kinds.places) == ((0, 1, 0, 2, 0), (0, 0, 1, 0, 2))
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), mixed)
    fused = fuse_projections(mixed, MODEL)
    forms = {
        "stacked": stacked,
        "fused": fused,
        "fused, stacked": stack_blocks(fused),
        "stacked, fused": fuse_projections(stacked, MODEL),
        "level": level_blocks(fused),
        "measured": for_measuring(mixed, "unpacked"),
        "measured, packed": for_measuring(mixed, "packed"),
        "in rows": in_rows(mixed, MODEL),
        "fused, in rows": in_rows(fused, MODEL),
    }
    for name, params in forms.items():
        tolerance = 2e-3 if "rows" in name else 1e-5
        atol = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(LOGITS(MODEL, params, TOKENS), expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["packed", "unpacked"])
def test_mixed_models_generate_and_are_measured(mixed, memory):
    dense = jax.tree.map(
        lambda leaf: np.asarray(spqr_dequantize(leaf)).T if isinstance(leaf, SpqrTensor) else leaf,
        mixed,
        is_leaf=lambda leaf: isinstance(leaf, SpqrTensor),
    )
    prompts = [[3, 1, 4], [1, 5, 9, 2]]
    expected = generate(MODEL, dense, prompts, max_new_tokens=4)
    assert generate(MODEL, for_decoding(MODEL, mixed, memory), prompts, max_new_tokens=4) == expected
    text = np.tile(TOKENS.reshape(-1), 3)
    found = perplexity(MODEL, for_measuring(mixed, memory), text, window=32)
    assert found == pytest.approx(perplexity(MODEL, dense, text, window=32), rel=1e-4)


@pytest.mark.slow
def test_compile_time_grows_with_kinds_of_blocks_and_not_with_blocks(mixed):
    """The program of five blocks of three kinds has the operations of three blocks."""

    def operations(params: dict[str, Any]) -> int:
        layers = sum(name.startswith("layers_") for name in params)
        model = Llama(LlamaConfig(61, 64, 128, layers, 4, 2, 16, RotaryConfig()))
        lowered = jax.jit(lambda params: model.apply({"params": params}, TOKENS)).lower(stack_blocks(params))
        return len(lowered.as_text().splitlines())

    rest = {name: part for name, part in mixed.items() if not name.startswith("layers_")}
    layers = [mixed[f"layers_{index}"] for index in (0, 1, 3)]
    few, many = ({**rest, **{f"layers_{i}": part for i, part in enumerate(layers * n)}} for n in (1, 6))
    assert operations(many) < 1.05 * operations(few)


@pytest.mark.slow
def test_saved_loaded_and_exported(mixed, tmp_path: Path):
    save(tmp_path / "packed", MODEL, mixed)
    loaded = load(tmp_path / "packed")[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, mixed)
    export_huggingface(tmp_path / "export", MODEL, mixed)
    exported = from_pretrained(tmp_path / "export")
    np.testing.assert_allclose(
        LOGITS(exported.model, exported.params, TOKENS), LOGITS(MODEL, mixed, TOKENS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_runs_from_disk_to_disk_record_their_rules(mixed, tmp_path: Path):
    source = ModelSource(MODEL, {name: partial(PARAMS.__getitem__, name) for name in PARAMS}, None, "random")
    quantize_checkpoint(source, tmp_path / "out", TOKENS, config=CONFIG, rules=RULES)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], mixed)
    record = read_record(tmp_path / "out")
    assert record is not None
    assert Plan.of(record.config, record.rules) == Plan.of(CONFIG, RULES)
    assert describe(tmp_path / "out")["matrices"]["layers_1.v_proj.kernel"]["bits"] == 8


@pytest.mark.slow
def test_round_to_nearest_takes_rules():
    quantized, report = quantize(PARAMS, None, model=MODEL, config=CONFIG, rules=RULES)
    assert bits(quantized, 1, "v_proj") == 8
    config = Plan.of(CONFIG, RULES).find("layers_1.v_proj")
    assert config is not None
    alone = quantize_matrix(jnp.asarray(PARAMS["layers_1"]["v_proj"]["kernel"].T), None, config)
    np.testing.assert_array_equal(quantized["layers_1"]["v_proj"]["kernel"].codes, alone.codes)
    assert "layers_0.down_proj" not in report


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (
            [("layers_9.*", {"bits": 8})],
            r"the rule 'layers_9\.\*' matches no matrix: the names go from",
        ),
        ([("*", {"bit": 8})], r"the rule '\*': 'bit' is no setting: give bits, group_size"),
        ([("*", {"bits": "8"})], r"the rule '\*': bits is '8': give int"),
        ([("*", {"damping": -1.0})], r"the rule '\*': damping is -1\.0, but must be a finite number"),
        ([("*", {"refit": False})], r"the rule '\*' sets refit, which holds for the whole run"),
        ([("layers_2.k_proj", {"permutation": "identity"})], "layers_2: matrices of one input need one permutation"),
        ([("layers_2.k_proj", {"bits": 7})], r"layers_2\.k_proj: bits is 7, but must be one of"),
    ],
)
def test_rules_that_cannot_be(rules, named):
    with pytest.raises(ValueError, match=named):
        quantize(PARAMS, TOKENS, model=MODEL, config=CONFIG, rules=rules)


@pytest.mark.devices
def test_mixed_models_are_split_over_devices(mixed):
    sharded = shard_params(mixed, MODEL, jax.make_mesh((2,), ("model",)))
    np.testing.assert_allclose(LOGITS(MODEL, sharded, TOKENS), LOGITS(MODEL, mixed, TOKENS), rtol=1e-3, atol=1e-3)
