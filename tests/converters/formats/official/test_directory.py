"""Directories of the official `main.py --save`, against what the official reader in Python makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.official_goldens import expected_weights, unpack_directories, weight_in_order
from helpers.tiny_models import tiny_config

from converters import ConversionError
from converters.families.llama import LLAMA
from converters.formats.official.directory import is_official_directory, open_official_directory
from converters.layout import part_readers
from spqr_jax.models import Llama

torch = pytest.importorskip("torch")

CASES = ("llama", "float32", "bfloat16", "plain_float32", "plain_float16", "wide", "six", "mixed")
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
FILE = "0/self_attn.k_proj"
SIDES = {"scale": "quant_layer_scale", "zero": "quant_layer_zeros"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_directories(tmp_path_factory.mktemp("official"))


def read(directory: Path, name: str = K_PROJ) -> Any:
    return open_official_directory(directory).tensors[name].read()


def exact_weight(content: dict[str, Any], unit: float) -> tuple[np.ndarray, np.ndarray]:
    """scale · (code − zero), or the outlier, in float64, and how far a result may be when all is rounded.

    Both in quantization order. To first order, when every stored number and every step has a relative error of up to
    `unit`; numbers are rounded to float16, which also has a smallest step, 2⁻²⁴.
    """

    def side_by_side(key: str) -> np.ndarray:
        return np.stack([tensor.double().numpy().reshape(-1) for tensor in content[key]], axis=1)

    def statistics(kind: str) -> tuple[np.ndarray, np.ndarray]:
        values, second_level = side_by_side(SIDES[kind]), f"quant_layer_{kind}_qq"
        if not content[f"{second_level}_scale"]:
            return values, unit * np.abs(values) + 2.0**-25
        scale, zero = (side_by_side(f"{second_level}_{part}") for part in ("scale", "zero"))
        rows = len(values) // len(scale)
        scale, zero = np.repeat(scale, rows, axis=0), np.repeat(zero, rows, axis=0)
        terms = values % 256 - zero
        values = scale * terms
        return values, unit * (3 * np.abs(values) + np.abs(scale * zero)) + 2.0**-25 * np.abs(terms)

    parts = [np.repeat(part, content["groupsize"], axis=1) for kind in SIDES for part in statistics(kind)]
    scale, scale_error, zero, zero_error = parts
    terms = content["quant_weights"].double().numpy() % 256 - zero
    error = np.abs(terms) * scale_error + np.abs(scale) * (zero_error + 2 * unit * np.abs(terms))
    outliers = content["outliers_matrix"].to_dense().double().numpy()
    # Only an outlier's residual is rounded.
    residual = np.abs(outliers - scale * terms)
    return (
        np.where(outliers == 0, scale * terms, outliers),
        1.01 * np.where(outliers == 0, error, 2.0**-11 * residual + 2.0**-25),
    )


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_official_reader(directories: Path, case: str) -> None:
    tensors = open_official_directory(directories / case).tensors
    weights = expected_weights(case)
    assert len(weights) == (14 if case == "llama" else 1)
    for name, expected in weights.items():
        stored = tensors[f"model.layers.{name.replace('/', '.')}.weight"]
        assert (stored.shape, stored.kind) == (expected.shape, "SpQR")
        packed, content = stored.read(), torch.load(directories / case / name)
        weight, expected = weight_in_order(packed), expected[:, content["perm"].numpy()]
        if packed.permutation is not None:
            np.testing.assert_array_equal(packed.permutation, content["perm"].numpy())
        # The official reader computes in the type in which the numbers are stored.
        unit = 2.0**-8 if case == "bfloat16" else 2.0**-11
        exact, bound = exact_weight(content, unit)
        assert bound.mean() < 24 * unit * np.abs(expected).mean()
        assert (np.abs(weight - expected) <= bound).all()
        if content["save_float_dtype"] != torch.float32:
            # Then nothing but residuals is rounded in ours.
            _, bound = exact_weight(content, 2.0**-21)
            assert (np.abs(weight - exact) <= bound).all()


@pytest.mark.parametrize(
    ("case", "bits", "scale_bits", "zero_bits", "group_size"),
    [
        ("llama", 3, 3, 3, 16),
        ("plain_float32", 4, None, None, 32),
        ("wide", 8, 8, 8, 16),
        ("six", 8, 8, 8, 16),  # 6, 7 and 6 bits
        ("mixed", 3, 3, None, 16),
    ],
)
def test_formats(
    directories: Path, case: str, bits: int, scale_bits: int | None, zero_bits: int | None, group_size: int
) -> None:
    packed = read(directories / case)
    widths = [None if planes is None else len(planes) for planes in (packed.scale_codes, packed.zero_codes)]
    assert (packed.bits, *widths, packed.group_size) == (bits, scale_bits, zero_bits, group_size)
    assert all(isinstance(array, np.ndarray) for array in packed.arrays().values())
    ordered = case == "plain_float32"  # the only one that was quantized in the features' own order
    assert (packed.permutation is None) == ordered
    content = torch.load(directories / case / FILE)
    assert len(packed.outliers.values) == content["outliers_matrix"].values().count_nonzero()


def test_unquantized_parameters(directories: Path) -> None:
    tensors = open_official_directory(directories / "llama").tensors
    expected = torch.load(directories / "llama" / "not_quantized_weights.pt")
    assert len(tensors) == len(expected) + 14
    for name, parameter in expected.items():
        assert tensors[name].shape == tuple(parameter.shape)
        np.testing.assert_array_equal(tensors[name].read(), parameter.detach().numpy())


def test_a_whole_model_has_the_logits_of_the_official_weights(directories: Path) -> None:
    config = LLAMA.from_huggingface(tiny_config())
    tensors = open_official_directory(directories / "llama").tensors
    layout = LLAMA.layout(config, "huggingface")
    readers = part_readers(layout, tensors, dtype=jnp.float32, origin="llama")
    packed = {name: read() for name, read in readers.items()}
    dense = jax.tree.map(np.asarray, packed, is_leaf=lambda leaf: not isinstance(leaf, dict))
    modules = {target.source.split(".", 3)[-1].removesuffix(".weight"): target.path[1] for target in layout.targets}
    for name, weight in expected_weights("llama").items():
        index, _, sublayer = name.partition("/")
        dense[f"layers_{index}"][modules[sublayer]] = {"kernel": weight.T}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 20)))
    apply = jax.jit(Llama(config).apply)
    logits, expected = (np.asarray(apply({"params": params}, tokens)) for params in (packed, dense))
    # The official reader computes weights in float16, so they differ by 6e-4 of their size.
    assert np.square(logits - expected).mean() < np.square(0.005 * expected).mean()
    assert expected.std() > 5


def test_where_the_model_is(directories: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(directories / "float32", tmp_path / "copy")
    assert open_official_directory(directory).model == "tiny-llama"
    (directory / "config.json").write_text(json.dumps(tiny_config()))
    assert open_official_directory(directory).model == str(directory)


def test_what_looks_like_an_official_directory(directories: Path, tmp_path: Path) -> None:
    assert is_official_directory(directories / "llama")
    assert not is_official_directory(directories)
    assert not is_official_directory(tmp_path)


def test_blocks_of_falcon(directories: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(directories / "float32", tmp_path / "copy")
    (directory / FILE).rename(directory / "0" / "self_attention.query_key_value")
    names = ("transformer.word_embeddings.weight", "transformer.h.0.ln_attn.weight", "transformer.ln_f.bias")
    torch.save({name: torch.ones(64) for name in names}, directory / "not_quantized_weights.pt")
    name = "transformer.h.0.self_attention.query_key_value.weight"
    assert open_official_directory(directory).tensors.keys() == {*names, name}
    np.testing.assert_array_equal(read(directory, name).codes, read(directories / "float32").codes)


# What cannot be read


def change(directory: Path, file: str, **values: Any) -> None:
    """Replaces entries of a saved dict, or takes out those whose value is None."""
    content = torch.load(directory / file) | values
    torch.save({key: value for key, value in content.items() if value is not None}, directory / file)


def changed(source: Path, destination: Path, file: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    directory = shutil.copytree(source, destination)
    change(directory, file, **edit(torch.load(source / file)))
    return directory


def first_column(content: dict[str, Any], key: str, factor: float) -> dict[str, Any]:
    return {key: [content[key][0] * factor, *content[key][1:]]}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: {"perm": None}, "lacks perm"),
        (lambda c: {"perm": "act_order"}, "perm is a str, not a tensor"),
        (lambda c: {"perm": c["perm"][:1].expand(2**40)}, r"perm is \[1099511627776\], but must be \[64\]"),
        (lambda c: {"groupsize": 16.0}, "groupsize is 16.0, not an integer"),
        (lambda c: {"weight_shape": torch.Size([32])}, r"weight_shape is .*32.*, not two integers"),
        (lambda c: {"quant_layer_scale": c["quant_layer_scale"][0]}, "quant_layer_scale is a Tensor, not a list"),
        (lambda c: {"quant_layer_zeros": [1, 2, 3, 4]}, "quant_layer_zeros is a int, not a tensor"),
        (lambda c: {"quant_layer_scale_qq_scale": []}, "quant_layer_scale has codes, but .*_qq_scale is empty"),
        (lambda c: {"outliers_matrix": 0}, "not a sparse matrix"),
        (lambda c: {"outliers_matrix": torch.ones(32, 64).to_sparse(1)}, "not a sparse matrix"),
        (lambda c: {"groupsize": 12}, "group_size is 12"),
        (lambda c: {"groupsize": 32}, r"quant_layer_scale has 4 tensors of 32 entries, but must have 2 of 32"),
        (lambda c: {"weight_shape": torch.Size([32, 80])}, r"quant_weights is \[32, 64\], but must be \[32, 80\]"),
        (lambda c: {"weight_shape": torch.Size([24, 64])}, "24 output rows do not divide into .* 16"),
        (lambda c: {"quant_weights": c["quant_weights"] + 1}, "quant_weights has codes up to 8, more than 3 bits"),
        (lambda c: {"quant_weights": -1 - c["quant_weights"]}, "codes up to 255"),
        (lambda c: {"quant_weights": c["quant_weights"].float()}, "quant_weights has the type float32"),
        (lambda c: first_column(c, "quant_layer_zeros", 2), "quant_layer_zeros has codes up to 14"),
        (lambda c: {"quant_layer_zero_qq_zero": c["quant_layer_zero_qq_zero"][1:]}, "qq_zero has 3 tensors"),
        (lambda c: {"perm": c["perm"].clamp(min=2)}, "lacks 2 of 64 features, 0 first"),
        (lambda c: {"perm": c["perm"][1:]}, r"perm is \[63\]"),
        (lambda c: {"outliers_matrix": c["outliers_matrix"].to_dense()}, "not a sparse matrix of shape"),
        (lambda c: {"outliers_matrix": c["outliers_matrix"] * torch.nan}, "outliers of .* values that are not finite"),
        (lambda c: {"outliers_matrix": c["outliers_matrix"] * 1e6}, "residuals of .* not finite in float16"),
        (lambda c: first_column(c, "quant_layer_scale_qq_scale", 1e9), "scales of .* not finite in float16"),
        (lambda c: first_column(c, "quant_layer_zero_qq_zero", torch.inf), "zeros of .* not finite in float16"),
    ],
)
def test_a_broken_matrix(directories: Path, tmp_path: Path, edit: Callable, named: str) -> None:
    directory = changed(directories / "float32", tmp_path / "copy", FILE, edit)
    with pytest.raises(ConversionError, match=named) as raised:
        read(directory)
    assert str(directory / FILE) in str(raised.value)


def test_statistics_too_small_for_float16(directories: Path, tmp_path: Path) -> None:
    def shrink(content: dict[str, Any]) -> dict[str, Any]:
        return {"quant_layer_scale_qq_scale": [scale * 1e-5 for scale in content["quant_layer_scale_qq_scale"]]}

    directory = changed(directories / "float32", tmp_path / "copy", FILE, shrink)
    with pytest.raises(ConversionError, match=r"scales of .* change by \d+\.\d% of the largest"):
        read(directory)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"wbits": 16}, "wbits is 16, but must be 1 to 8"),
        ({"wbits": 3.0}, r"wbits is 3\.0"),
        ({"qq_groupsize": "16"}, "qq_groupsize is '16', not an integer"),
        ({"qq_scale_bits": 0}, "qq_scale_bits is 0"),
        ({"qq_groupsize": 8}, "stats_group_size is 8"),
        ({"qq_groupsize": 32}, "qq_scale has 4 tensors of 2 entries, but must have 4 of 1"),
        ({"wbits": None}, "args.pt lacks wbits"),
    ],
)
def test_settings_that_contradict(directories: Path, tmp_path: Path, values: dict[str, Any], named: str) -> None:
    directory = shutil.copytree(directories / "float32", tmp_path / "copy")
    change(directory, "args.pt", **values)
    with pytest.raises(ConversionError, match=named):
        read(directory)


def test_blocks_without_a_name(directories: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(directories / "float32", tmp_path / "copy")
    torch.save({"model.norm.weight": torch.ones(64)}, directory / "not_quantized_weights.pt")
    with pytest.raises(ConversionError, match=r"not_quantized_weights\.pt .* begin with nothing before a number"):
        open_official_directory(directory)


@pytest.mark.parametrize("file", ["args.pt", "not_quantized_weights.pt", FILE])
def test_a_file_of_another_kind(directories: Path, tmp_path: Path, file: str) -> None:
    directory = shutil.copytree(directories / "float32", tmp_path / "copy")
    torch.save([1, 2], directory / file)
    with pytest.raises(ConversionError, match=f"{file} holds a list, not a dict"):
        open_official_directory(directory)
    (directory / file).write_bytes(b"nothing")
    with pytest.raises(ConversionError, match=file):
        open_official_directory(directory)
