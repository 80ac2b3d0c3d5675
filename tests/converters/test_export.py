"""Exports read by transformers, by the official reader's rules and by this library are the model that was written."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.byte_tokenizer import byte_tokenizer
from helpers.random_packed import random_packed
from helpers.tiny_falcon import STYLES, falcon_config, falcon_tensors
from helpers.tiny_models import mistral_config, random_tensors, tiny_config, write_checkpoint
from safetensors.numpy import load_file

from converters import ConversionError, Pretrained, export, export_hf_spqr, export_huggingface, from_pretrained
from pallas_kernels import SpqrTensor, spqr_dequantize
from spqr_jax import SpqrConfig, perplexity, quantize
from spqr_jax.models import Decoder, layer_name

TOKENS = np.random.default_rng(1).integers(0, 96, (8, 64)).astype(np.int32)
DEQUANTIZE = jax.jit(spqr_dequantize)


def llama() -> dict[str, Any]:
    return tiny_config(num_key_value_heads=2, rope_scaling={"type": "linear", "factor": 2.0})


CASES = {
    "llama": (llama(), random_tensors),
    "mistral": (mistral_config(num_key_value_heads=1), random_tensors),
    "falcon 7B": (falcon_config(**STYLES["7B"]), falcon_tensors),
    "falcon 11B": (falcon_config(**STYLES["11B"]), falcon_tensors),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in CASES],
)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    config, tensors = CASES[request.param]
    model, params, _ = from_pretrained(
        write_checkpoint(tmp_path_factory.mktemp("original"), config, tensors(config)), dtype=np.float32
    )
    return Pretrained(model, quantize(params, TOKENS, model=model, config=SpqrConfig())[0], byte_tokenizer())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return from_pretrained(write_checkpoint(tmp_path_factory.mktemp("plain"), llama(), random_tensors(llama())))


def leaves(params: dict[str, Any]) -> dict[str, Any]:
    flat = flatten_dict(params, sep=".")
    return {name: DEQUANTIZE(leaf).T if isinstance(leaf, SpqrTensor) else leaf for name, leaf in flat.items()}


def torch_perplexity(model: Any, tokens: np.ndarray) -> float:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        loss = model(torch.from_numpy(tokens.astype(np.int64)), labels=torch.from_numpy(tokens.astype(np.int64))).loss
    return float(torch.exp(loss))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", 1e-5),
        pytest.param("float16", 5e-3, marks=pytest.mark.slow),
        pytest.param("bfloat16", 5e-2, marks=pytest.mark.slow),
    ],
)
def test_transformers_loads_the_dequantized_model(
    quantized: Pretrained, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params, tokenizer = quantized
    export_huggingface(tmp_path / "out", model, params, tokenizer=tokenizer, dtype=dtype)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reference.dtype == getattr(torch, dtype)
    assert reference.config.model_type == (model.alias or type(model).__name__.lower())
    # All windows in one text: of equal length, so their mean is that of the batch.
    expected = perplexity(model, params, TOKENS.reshape(-1), window=TOKENS.shape[1])
    assert torch_perplexity(reference.float(), TOKENS) == pytest.approx(expected, rel=tolerance)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("hello")["input_ids"]
    assert ids == tokenizer("hello")["input_ids"]


@pytest.mark.slow
def test_dequantized_weights_come_back(quantized: Pretrained, tmp_path: Path) -> None:
    export_huggingface(tmp_path / "out", quantized.model, quantized.params, dtype="float32")
    model, params, _ = from_pretrained(tmp_path / "out")
    assert model == quantized.model
    jax.tree.map(np.testing.assert_array_equal, leaves(params), leaves(quantized.params))


def test_packed_weights_come_back(quantized: Pretrained, tmp_path: Path) -> None:
    export_hf_spqr(tmp_path / "out", quantized.model, quantized.params, tokenizer=quantized.tokenizer)
    model, params, tokenizer = from_pretrained(tmp_path / "out")
    assert model == quantized.model
    assert tokenizer("hello")["input_ids"] == quantized.tokenizer("hello")["input_ids"]
    before, after = flatten_dict(quantized.params), flatten_dict(params)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if not isinstance(leaf, SpqrTensor):
            np.testing.assert_array_equal(after[path], np.asarray(leaf).astype(np.float16))
            continue
        # Equal to rounding in float16: codes and statistics are the same, an outlier is rounded once or twice.
        for name, array in leaf.arrays().items():
            if name not in ("codes", "outlier_values"):
                np.testing.assert_array_equal(after[path].arrays()[name], array)
        weight = np.asarray(DEQUANTIZE(leaf))
        np.testing.assert_allclose(DEQUANTIZE(after[path]), weight, rtol=0, atol=2**-10 * np.abs(weight).max())


def official_library() -> SimpleNamespace:
    """A stand-in for the package `spqr_quant`, multiplying on the CPU by the rules of its GPU reader."""
    torch = pytest.importorskip("torch")

    class QuantizedLinear(torch.nn.Module):
        def __init__(self, rows: int, cols: int, lengths: dict[str, int]) -> None:
            super().__init__()
            self.rows, self.cols = rows, cols
            for name, length in lengths.items():
                kind = torch.int64 if name == "dense_weights" else torch.int32
                setattr(self, name, torch.nn.Parameter(torch.empty(length, dtype=kind), requires_grad=False))

        @staticmethod
        def create_placeholder(rows: int, cols: int, bits: int, beta1: int, beta2: int, **shapes: int) -> Any:
            assert (bits, beta1, beta2) == (3, 16, 16)
            return QuantizedLinear(rows, cols, {k.removesuffix("_shape"): v for k, v in shapes.items()})

        def forward(self, x: Any) -> Any:
            arrays = {name: parameter.numpy() for name, parameter in self.named_parameters()}
            weight = torch.from_numpy(official_weight(arrays, self.rows, self.cols)).to(x.dtype)
            order = arrays["in_perm"].view(np.uint16).astype(np.int64)
            return x[..., torch.from_numpy(order)] @ weight.T

    return SimpleNamespace(QuantizedLinear=QuantizedLinear)


def official_weight(arrays: dict[str, np.ndarray], rows: int, cols: int) -> np.ndarray:
    """Row by row and bit by bit: float16(float16 dense weight + value), columns in quantization order."""
    weight = np.zeros((rows, cols), np.float32)
    words = arrays["dense_weights"].view(np.uint64).reshape(rows // 16, cols // 16, 16)
    for i, j in np.ndindex(*words.shape[:2]):
        octets = bytes(int(words[i, j, 2 * k] >> np.uint64(54)) & 255 for k in range(8))
        scale_scale, zero_scale, scale_zero, zero_zero = np.frombuffer(octets, np.float16)
        for r in range(16):
            codes = np.array([int(words[i, j, r]) >> 3 * k & 7 for k in range(18)], np.float16)
            scale = scale_scale * (codes[0] - scale_zero)
            zero = zero_scale * (codes[1] - zero_zero)
            weight[16 * i + r, 16 * j : 16 * j + 16] = scale * (codes[2:] - zero)
    entries = arrays["col_vals"].view(np.uint32)
    for row in range(rows):
        for entry in entries[arrays["row_offsets"][row] : arrays["row_offsets"][row + 1]]:
            weight[row, entry & 0xFFFF] += np.array([entry >> 16], np.uint16).view(np.float16)[0]
    return weight.astype(np.float16)


def test_transformers_loads_the_packed_model(
    quantized: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through transformers' own SpQR integration, with a stand-in for the official GPU module."""
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.quantizers import quantizer_spqr

    integration = sys.modules["transformers.integrations.spqr"]
    export_hf_spqr(tmp_path / "out", quantized.model, quantized.params)
    monkeypatch.setitem(sys.modules, "spqr_quant", official_library())
    monkeypatch.setattr(integration, "is_spqr_available", lambda: True)
    monkeypatch.setattr(quantizer_spqr, "is_spqr_available", lambda: True)
    monkeypatch.setattr(quantizer_spqr, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantizer_spqr, "replace_with_spqr_linear", with_nested_modules(integration))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    monkeypatch.undo()
    assert type(reference).__name__ == f"{(quantized.model.alias or type(quantized.model).__name__).title()}ForCausalLM"
    packed = [leaf for leaf in jax.tree.leaves(quantized.params, is_leaf=is_packed) if is_packed(leaf)]
    modules = [module for module in reference.modules() if type(module).__name__ == "QuantizedLinear"]
    assert len(modules) == len(packed) > 0
    # transformers forbids casting a quantized model; here only its dense weights are cast.
    reference = torch.nn.Module.float(reference)
    found = torch_perplexity(reference, TOKENS)
    expected = perplexity(quantized.model, quantized.params, TOKENS.reshape(-1), window=TOKENS.shape[1])
    # Weights have been rounded to float16; with random ones, losses are up to 28 nats, and move by that share of it.
    assert math.log(found) == pytest.approx(math.log(expected), rel=2**-11)
    # With weights that are rounded as the official reader does it, nothing is left of that.
    export_huggingface(tmp_path / "dense", quantized.model, quantized.params, dtype="float32")
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    rounded.load_state_dict(reference.state_dict(), strict=False)
    for name, module in reference.named_modules():
        if module in modules:
            arrays = {key: parameter.numpy() for key, parameter in module.named_parameters()}
            order = arrays["in_perm"].view(np.uint16).astype(np.int64)
            weight = torch.from_numpy(official_weight(arrays, module.rows, module.cols)).float()
            rounded.get_submodule(name).weight.data[:, order] = weight
    rounded.save_pretrained(tmp_path / "rounded")
    model, params, _ = from_pretrained(tmp_path / "rounded")
    assert found == pytest.approx(perplexity(model, params, TOKENS.reshape(-1), window=TOKENS.shape[1]), rel=1e-4)


def with_nested_modules(integration: Any) -> Any:
    """transformers 5.23 looks for `model.layers.0.…` among the model's direct children, and fails; here they are."""
    original = integration.replace_with_spqr_linear

    def replace(model: Any, **options: Any) -> Any:
        modules = dict(model.named_modules())
        view = SimpleNamespace(named_modules=modules.items, _modules=modules, set_submodule=model.set_submodule)
        original(view, **options)
        return model

    return replace


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, SpqrTensor)


def test_the_official_readers_sum_is_the_weight_of_an_outlier(quantized: Pretrained, tmp_path: Path) -> None:
    export_hf_spqr(tmp_path / "out", quantized.model, quantized.params)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    outliers = inexact = 0
    for path, leaf in flatten_dict(quantized.params).items():
        if not is_packed(leaf):
            continue
        out, columns = leaf.shape
        pattern = rf"(.*\.{path[0].removeprefix('layers_')}\..*\.{path[1]})\.dense_weights"
        (module,) = (match[1] for name in stored if (match := re.fullmatch(pattern, name)))
        arrays = {name: stored[f"{module}.{name}"] for name in ("dense_weights", "row_offsets", "col_vals", "in_perm")}
        order = arrays["in_perm"].view(np.uint16)
        ours = np.asarray(DEQUANTIZE(leaf))[:, order].astype(np.float16)
        theirs = official_weight(arrays, out, columns)
        rows = np.repeat(np.arange(out), np.diff(arrays["row_offsets"]))
        places = rows, arrays["col_vals"].view(np.uint32).astype(np.uint16)
        # For some weights there is no such float16 value above any code; then it is the nearest.
        inexact += np.count_nonzero(theirs[places] != ours[places])
        np.testing.assert_allclose(theirs[places], ours[places], rtol=0, atol=2**-11 * np.abs(ours).max())
        outliers += len(rows)
        # The dense part: three float16 operations instead of one rounding at the end.
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=2**-8 * np.abs(ours).max())
    assert outliers > 50
    assert inexact < 0.02 * outliers


def test_large_models_are_written_in_shards(
    quantized: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    export_huggingface(tmp_path / "out", quantized.model, quantized.params, dtype="float32")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] > 0
    _, params, _ = from_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, leaves(params), leaves(quantized.params))


def randomly_packed(model: Decoder, params: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The parameters with random packed matrices of another format in the place of all kernels of the blocks."""
    rng = np.random.default_rng(0)
    packed = dict(params)
    for index in range(model.config.num_layers):
        block = dict(params[layer_name(index)])
        for name in model.new_block().matrices():
            columns, out = block[name]["kernel"].shape
            block[name] = block[name] | {"kernel": random_packed(rng, out, columns, outliers="none", **settings)}
        packed[layer_name(index)] = block
    return packed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 4}, ["4", "3"]),
        ({"group_size": 32}, ["32", "16"]),
        ({"stats_bits": 4}, ["4", "3"]),
        ({"stats_bits": None}, ["statistics"]),
        ({"stats_group_size": 32}, ["32", "16"]),
    ],
)
def test_other_formats_are_refused(plain: Pretrained, settings: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as error:
        export_hf_spqr(tmp_path / "out", plain.model, randomly_packed(plain.model, plain.params, **settings))
    for word in ["self_attn.q_proj", *words]:
        assert word in str(error.value)
    assert not list(tmp_path.iterdir())


def test_biases_are_refused(tmp_path: Path) -> None:
    config = falcon_config(**STYLES["RW"])
    model, params, _ = from_pretrained(write_checkpoint(tmp_path / "in", config, falcon_tensors(config)))
    with pytest.raises(ConversionError, match=r"query_key_value has a bias"):
        export_hf_spqr(tmp_path / "out", model, randomly_packed(model, params))


def test_a_dense_model_is_refused(plain: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no packed matrix"):
        export_hf_spqr(tmp_path / "out", plain.model, plain.params)


def test_a_taken_destination_is_refused(plain: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="exists already"):
        export_huggingface(tmp_path, plain.model, plain.params)


def test_weights_too_large_for_the_type_are_refused(plain: Pretrained, tmp_path: Path) -> None:
    params = plain.params | {"norm": {"scale": np.full(64, 1e5, np.float32)}}
    with pytest.raises(ConversionError, match=r"model\.norm\.weight .*100000.*float16"):
        export_huggingface(tmp_path / "out", plain.model, params, dtype="float16")
    assert not list(tmp_path.iterdir())
    export_huggingface(tmp_path / "out", plain.model, params, dtype="bfloat16")


def test_a_failed_write_leaves_nothing(plain: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(ConversionError, match="No space left"):
        export_huggingface(tmp_path / "out", plain.model, plain.params)
    assert not list(tmp_path.iterdir())
