"""Hugging Face checkpoints in the official SpQR format, written as its tools write them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.official_goldens import in_ptcsr, packed_matrix
from helpers.same import assert_equal
from safetensors.numpy import save_file

from converters import ConversionError
from converters.formats.official.hf_spqr import ADDED, open_hf_spqr
from converters.formats.official.tiles import decode_tensor, encode_tensor
from converters.formats.safetensors import open_safetensors
from converters.layout import StoredTensor

MODULE = "model.layers.0.self_attn.k_proj"
PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")
EMPTY = np.zeros(0, np.int32)


def configuration(modules: dict[str, dict[str, np.ndarray]], **options: Any) -> dict[str, Any]:
    """The `quantization_config` for these modules."""
    return {
        "quant_method": "spqr",
        "bits": 3,
        "beta1": 16,
        "beta2": 16,
        "modules_to_not_convert": ["model.norm.weight", "lm_head.weight"],
        "shapes": {
            f"{module}.{part}.shape": len(array) for module, arrays in modules.items() for part, array in arrays.items()
        },
        **options,
    }


def write(directory: Path, modules: dict[str, dict[str, np.ndarray]]) -> dict[str, StoredTensor]:
    tensors = {f"{module}.{part}": array for module, arrays in modules.items() for part, array in arrays.items()}
    tensors["model.norm.weight"] = np.ones(576, np.float16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return open_safetensors(directory)


def test_modules_become_matrices(tmp_path: Path) -> None:
    (k_proj, k_shape, content), (q_proj, q_shape, _) = packed_matrix("k_proj"), packed_matrix("q_proj")
    modules = {MODULE: in_ptcsr(content), "model.layers.0.self_attn.q_proj": q_proj}
    tensors = open_hf_spqr(write(tmp_path, modules), configuration(modules), tmp_path)
    assert {name: (tensor.shape, tensor.kind) for name, tensor in tensors.items()} == {
        "model.norm.weight": ((576,), "F16"),
        f"{MODULE}.weight": ((192, 576), "SpQR"),
        "model.layers.0.self_attn.q_proj.weight": ((576, 576), "SpQR"),
    }
    assert_equal(tensors[f"{MODULE}.weight"].read(), decode_tensor(k_proj, k_shape, "k"))
    assert_equal(tensors["model.layers.0.self_attn.q_proj.weight"].read(), decode_tensor(q_proj, q_shape, "q"))


def test_added_outliers(tmp_path: Path) -> None:
    arrays, shape, _ = packed_matrix("k_proj")
    exported = encode_tensor(decode_tensor(arrays, shape, "k"), "k")
    stored = write(tmp_path, {MODULE: exported})
    for options, added in ((ADDED, True), ({}, False)):
        tensors = open_hf_spqr(stored, configuration({MODULE: exported}, **options), tmp_path)
        assert_equal(tensors[f"{MODULE}.weight"].read(), decode_tensor(exported, shape, "k", added=added))


def without_permutation(rows: str, outliers: bool) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    arrays, shape, content = packed_matrix("k_proj")
    arrays = {**(arrays if rows == "csr" else in_ptcsr(content)), "in_perm": EMPTY}
    if not outliers:
        # As the official writer leaves it: an empty array of floats.
        arrays |= {"row_offsets": np.zeros_like(arrays["row_offsets"]), "col_vals": np.zeros(0, np.float32)}
    return arrays, shape


@pytest.mark.parametrize(("rows", "outliers"), [("csr", True), ("ptcsr", True), ("csr", False)])
def test_the_shape_follows_without_a_permutation(tmp_path: Path, rows: str, outliers: bool) -> None:
    # Read in the other order, 193 offsets would make it 3072 × 36, and 13 offsets 12 × 9216: not multiples of 16.
    arrays, shape = without_permutation(rows, outliers)
    tensor = open_hf_spqr(write(tmp_path, {MODULE: arrays}), configuration({MODULE: arrays}), tmp_path)
    packed = tensor[f"{MODULE}.weight"].read()
    assert tensor[f"{MODULE}.weight"].shape == packed.shape == shape
    assert packed.permutation is None
    assert len(packed.outliers.values) == (2187 if outliers else 0)


@pytest.mark.parametrize("rows", ["csr", "ptcsr"])
def test_where_both_orders_give_a_shape_the_offsets_decide(tmp_path: Path, rows: str) -> None:
    # 512 × 512: PTCSR's 33 offsets could be 32 × 8192 in CSR, and CSR's 513 could be 8192 × 32 in PTCSR.
    every = np.arange(1, 513)
    if rows == "csr":
        row_offsets, col_vals = np.concatenate([[0], every]), every % 512 + (0x3C00 << 16)
    else:
        row_offsets, col_vals = np.arange(0, 513, 16), every % 512 + (0x3C00 << 16)
    arrays = {
        "dense_weights": np.zeros(512 * 512 // 16, np.int64),
        "row_offsets": row_offsets.astype(np.int32),
        "col_vals": col_vals.astype(np.int32),
        "in_perm": EMPTY,
    }
    tensors = open_hf_spqr(write(tmp_path, {MODULE: arrays}), configuration({MODULE: arrays}), tmp_path)
    packed = tensors[f"{MODULE}.weight"].read()
    assert packed.shape == (512, 512)
    np.testing.assert_array_equal(packed.outliers.offsets, np.arange(513))


def test_an_absent_permutation_is_the_identity(tmp_path: Path) -> None:
    arrays, shape = without_permutation("csr", True)
    del arrays["in_perm"]
    for absent in ({}, {f"{MODULE}.in_perm.shape": 0}):
        settings = configuration({MODULE: arrays})
        settings["shapes"] |= absent
        tensor = open_hf_spqr(write(tmp_path, {MODULE: arrays}), settings, tmp_path)[f"{MODULE}.weight"]
        assert tensor.shape == shape
        assert tensor.read().permutation is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"bits": 4}, "bits 4 is not supported, only 3"),
        ({"beta1": 32}, "beta1 32"),
        ({"beta2": 8}, "beta2 8"),
        ({"outlier_values": "scaled"}, "outlier_values 'scaled'"),
        ({"outlyer_values": "added"}, r"config\.json: .* unknown settings: 'outlyer_values'"),
        ({"shapes": [1]}, r"shapes in quantization_config is \[1\]"),
        ({"shapes": {f"{MODULE}.col_vals.shape": 5}}, r"k_proj\.col_vals has the shape \[2187\], but .* says 5"),
        ({"shapes": {"lm_head.dense_weights.shape": 5}}, r"lm_head\.dense_weights is missing"),
    ],
)
def test_settings_that_contradict(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    arrays, _, _ = packed_matrix("k_proj")
    with pytest.raises(ConversionError, match=named) as raised:
        open_hf_spqr(write(tmp_path, {MODULE: arrays}), configuration({MODULE: arrays}, **options), tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor(tmp_path: Path, part: str) -> None:
    arrays, _, _ = packed_matrix("k_proj")
    settings = configuration({MODULE: arrays})
    del arrays[part]
    with pytest.raises(ConversionError, match=rf"k_proj\.{part} is missing"):
        open_hf_spqr(write(tmp_path, {MODULE: arrays}), settings, tmp_path)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (
            {"dense_weights": np.zeros(100, np.int64)},
            "no matrix has .* dense_weights 100, row_offsets 193, .* in_perm 288",
        ),
        ({"in_perm": EMPTY, "row_offsets": EMPTY}, "no matrix has tensors"),
        ({"dense_weights": np.zeros((6912, 1), np.int64)}, r"dense_weights has the shape \[6912, 1\]"),
        ({"weight": np.zeros((192, 576), np.float16)}, "has both weight and dense_weights"),
    ],
)
def test_tensors_that_contradict(tmp_path: Path, arrays: dict[str, np.ndarray], named: str) -> None:
    arrays = {**packed_matrix("k_proj")[0], **arrays}
    settings = configuration({}, shapes={})
    with pytest.raises(ConversionError, match=named):
        open_hf_spqr(write(tmp_path, {MODULE: arrays}), settings, tmp_path)


def test_damage_inside_is_reported_with_its_name(tmp_path: Path) -> None:
    arrays, _, _ = packed_matrix("k_proj")
    arrays["col_vals"][3] = 0x7C000000
    tensors = open_hf_spqr(write(tmp_path, {MODULE: arrays}), configuration({MODULE: arrays}), tmp_path)
    with pytest.raises(ConversionError, match=f"{tmp_path}: {MODULE} has 1 of 2187"):
        tensors[f"{MODULE}.weight"].read()
