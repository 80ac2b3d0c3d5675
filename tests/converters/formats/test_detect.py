"""Forms of checkpoints: which one a path holds, the same parameters from all of them, and no code run from any."""

import json
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.same import assert_equal
from helpers.tiny_models import Tensors, random_tensors, tiny_config, write_checkpoint, write_gguf
from huggingface_hub.utils import filter_repo_objects

from converters import ConversionError, from_pretrained
from converters.formats.detect import open_source
from converters.formats.official.hf_spqr import ADDED
from converters.formats.official.tiles import encode_tensor
from pallas_kernels import SpqrTensor, spqr_dequantize

CONFIG = tiny_config()
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def message(path: object) -> str:
    with pytest.raises(ConversionError) as raised:
        from_pretrained(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def write_pytorch(directory: Path, tensors: Tensors, dtype: str = "float32", shards: int = 1, **options: Any) -> Path:
    """config.json and pytorch_model.bin, or an index and its shards, by PyTorch itself."""
    torch = pytest.importorskip("torch")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    state = {name: torch.from_numpy(tensor).to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", **options)
        return directory
    weight_map = {}
    for index in range(shards):
        file = f"pytorch_model-{index + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in sorted(state)[index::shards]}
        torch.save(part, directory / file, **options)
        weight_map |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_those_of_safetensors(tmp_path: Path, dtype: str, shards: int) -> None:
    tensors = random_tensors(CONFIG)
    rounded = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    expected = from_pretrained(write_checkpoint(tmp_path / "safetensors", CONFIG, rounded))
    found = from_pretrained(write_pytorch(tmp_path / "bin", tensors, dtype, shards))
    assert found.model == expected.model
    assert_equal(found.params, expected.params)
    source = open_source(tmp_path / "bin")
    assert source.form == "Hugging Face directory, PyTorch"
    kinds = {name: tensor.kind for name, tensor in open_source(tmp_path / "safetensors").tensors.items()}
    assert {name: tensor.kind for name, tensor in source.tensors.items()} == kinds


def test_views_in_other_orders_and_signs(tmp_path: Path) -> None:
    """PyTorch saves a view as it is, over the numbers of another tensor."""
    torch = pytest.importorskip("torch")
    tensors = random_tensors(CONFIG)
    expected = from_pretrained(write_checkpoint(tmp_path / "safetensors", CONFIG, tensors))
    state = {name: torch.from_numpy(tensor.T.copy()).t() for name, tensor in tensors.items()}
    state["model.norm.weight"] = torch._neg_view(-state["model.norm.weight"])
    write_pytorch(tmp_path / "bin", tensors)
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    assert_equal(from_pretrained(tmp_path / "bin").params, expected.params)


def test_files_older_than_the_archive_format(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    write_pytorch(tmp_path / "old", tensors, _use_new_zipfile_serialization=False)
    expected = from_pretrained(write_checkpoint(tmp_path / "safetensors", CONFIG, tensors))
    assert_equal(from_pretrained(tmp_path / "old").params, expected.params)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), shards=2)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert open_source(tmp_path).form == "Hugging Face directory, safetensors"
    from_pretrained(tmp_path)


def test_pytorch_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    text = message(tmp_path)
    assert "pytorch_model.bin" in text
    assert "PyTorch is not installed" in text


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda torch: [torch.ones(3)], "holds a list"),
        (lambda torch: {"a": {"b": torch.ones(3)}}, "a is a dict"),
        (lambda torch: {"a": torch.ones(3, dtype=torch.complex64)}, "a is of torch.complex64"),
        (lambda torch: {"a": torch.eye(3).to_sparse()}, "a is of torch.float32 and torch.sparse_coo"),
        (lambda torch: {"a": torch.ones(3, dtype=torch.float8_e4m3fn)}, "a is of torch.float8_e4m3fn"),
        (lambda torch: {"a": torch.ones(3, device="meta")}, "a is a tensor without its numbers"),
        (lambda torch: {"a": torch.nested.nested_tensor([torch.ones(3)])}, "a is a nested tensor"),
    ],
)
def test_content_that_is_no_weights(tmp_path: Path, make: Any, named: str) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(make(torch), tmp_path / "pytorch_model.bin")
    assert named in message(tmp_path)


def test_integers_are_not_weights(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    write_pytorch(tmp_path, {**tensors, "model.norm.weight": np.ones(64, np.int8)}, "int8")
    with pytest.raises(ConversionError, match=r"model\.norm\.weight: expected floating point, found I8"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("shard", "named"),
    [
        ("../outside.bin", "not in the same directory"),
        ("/etc/outside.bin", "not in the same directory"),
        ("", "not in the same directory"),
        ("absent.bin", "absent.bin is missing, but pytorch_model.bin.index.json refers to it"),
        ("x" * 300, "x is missing"),
    ],
)
def test_shards_lie_beside_their_index(tmp_path: Path, shard: str, named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert named in message(tmp_path)


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_pickle_is_refused(tmp_path: Path, archive: bool) -> None:
    torch = pytest.importorskip("torch")
    mark, directory = tmp_path / "executed", tmp_path / "model"
    pickle.loads(pickle.dumps(Payload(mark)))
    mark.rmdir()  # so it is there, once the payload has run
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    state = {"model.norm.weight": torch.ones(64), "payload": Payload(mark)}
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    assert "pytorch_model.bin" in message(directory)
    assert not mark.exists()


def test_modules_of_a_checkpoint_are_not_imported(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    config = tiny_config(auto_map=auto_map, trust_remote_code=True)
    write_checkpoint(tmp_path, config, random_tensors(config))
    byte_tokenizer().save_pretrained(tmp_path)
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    options |= {"auto_map": {"AutoTokenizer": [None, "modeling_x.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    mark = tmp_path / "executed"
    (tmp_path / "modeling_x.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).mkdir()\n")
    assert from_pretrained(tmp_path).tokenizer.encode("ab")
    assert not mark.exists()
    assert not [name for name in sys.modules if name.endswith("modeling_x")]


def test_gguf_by_name_or_content(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", CONFIG, random_tensors(CONFIG))
    shutil.copy(path, tmp_path / "blob")
    for name in ("model.gguf", "blob"):
        source = open_source(tmp_path / name)
        assert (source.form, source.model_type) == ("GGUF file", "llama")
        assert source.path == source.description == tmp_path / name
        assert source.tensors["blk.1.attn_k.weight"].shape == (32, 64)
    from_pretrained(tmp_path / "blob")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json", "notes.txt"])
def test_other_files(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"{}")
    assert "give the directory with its config.json" in message(tmp_path / file)


def test_directory_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "args.pt").write_bytes(b"")
    text = message(tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin", ".index.json", "args.pt", "not_quantized", "GGUF"):
        assert name in text


def test_checkpoint_of_this_project(tmp_path: Path) -> None:
    (tmp_path / "spqr.json").write_text("{}")
    assert "spqr_jax.load" in message(tmp_path)


def test_model_type_that_is_no_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(model_type=["llama"]), random_tensors(CONFIG))
    assert "['llama']" in message(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "pytorch", "gguf"])
def test_more_blocks_than_tensors(tmp_path: Path, form: str) -> None:
    """Not even their names fit into memory."""
    blocks, tensors = 1_000_000_000, random_tensors(CONFIG)
    path = tmp_path
    if form == "gguf":
        path = write_gguf(tmp_path / "model.gguf", CONFIG, tensors, metadata={"llama.block_count": blocks})
    elif form == "pytorch":
        write_pytorch(tmp_path, tensors)
    else:
        write_checkpoint(tmp_path, CONFIG, tensors)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": blocks}))
    assert re.search(f"{blocks} blocks, but .* has {len(tensors)} tensors", message(path))


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert "config.json is not JSON" in message(tmp_path)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A tiny LLaMA as the official code has saved it, from a model called `tiny-llama`; it has tiny_config()."""
    pytest.importorskip("torch")
    with tarfile.open(Path(__file__).parents[2] / "goldens" / "official_directory" / "directories.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "llama"


def write_description(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().save_pretrained(directory)


def packed_matrices(params: Any) -> list[SpqrTensor]:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))
    return [leaf for leaf in leaves if isinstance(leaf, SpqrTensor)]


@pytest.mark.parametrize("place", ["in it", "where the model was", "in the cache of the hub"])
def test_official_directory(
    official: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    if place == "in it":
        write_description(official)
    elif place == "where the model was":
        write_description(tmp_path / "tiny-llama")
    else:
        snapshot.parents[1].rename(tmp_path / "models--tiny-llama")
        write_description(tmp_path / "models--tiny-llama" / "snapshots" / "abc")
    monkeypatch.chdir(tmp_path)
    source = open_source(official)
    assert (source.form, source.path, source.model_type) == ("official SpQR directory", official, "llama")
    _, params, tokenizer = from_pretrained(official)
    assert len(packed_matrices(params)) == 14
    assert set(params["layers_1"]["down_proj"]) == {"kernel"}
    assert params["layers_1"]["down_proj"]["kernel"].shape == (64, 96)
    assert tokenizer.encode("ab") == byte_tokenizer().encode("ab")


def test_official_directory_whose_model_is_gone(official: Path, snapshot: Path) -> None:
    text = message(official)
    assert "at tiny-llama" in text
    assert "copy the model's config.json" in text


@pytest.mark.slow
def test_huggingface_directory_with_spqr(official: Path, tmp_path: Path) -> None:
    write_description(official)
    expected, tensors = from_pretrained(official), {}
    for name, stored in open_source(official).tensors.items():
        module = name.removesuffix(".weight")
        parts = {name: stored.read()} if stored.kind != "SpQR" else encode_tensor(stored.read(), module)
        tensors |= {f"{module}.{part}" if stored.kind == "SpQR" else part: array for part, array in parts.items()}
    shapes = {f"{name}.shape": array.size for name, array in tensors.items() if not name.endswith(".weight")}
    quantization = {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": shapes, **ADDED}
    write_checkpoint(tmp_path / "packed", {**CONFIG, "quantization_config": quantization}, tensors)
    source = open_source(tmp_path / "packed")
    assert source.form == "Hugging Face directory, SpQR"
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].kind == "SpQR"
    found = from_pretrained(tmp_path / "packed")
    assert found.model == expected.model
    for ours, theirs in zip(packed_matrices(found.params), packed_matrices(expected.params), strict=True):
        np.testing.assert_allclose(spqr_dequantize(ours), spqr_dequantize(theirs), rtol=2e-3, atol=1e-4)


def test_other_quantization_methods_are_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    write_checkpoint(tmp_path, config, random_tensors(CONFIG))
    assert open_source(tmp_path).form == "Hugging Face directory, safetensors"
    assert "gptq" in message(tmp_path)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that plays the hub: only the wanted files are copied from it."""
    remote = tmp_path / "remote"

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        assert hub_id == "someone/tiny"
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir(exist_ok=True)
        for name in filter_repo_objects([path.name for path in remote.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(remote / name, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote


@pytest.mark.parametrize("shards", [1, 2])
def test_only_what_is_needed_is_downloaded(remote: Path, shards: int) -> None:
    write_checkpoint(remote, CONFIG, random_tensors(CONFIG), shards=shards)
    (remote / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    wanted = {path.name for path in remote.iterdir()}
    others = ("pytorch_model.bin", "pytorch_model.bin.index.json", "modeling_x.py", "consolidated.00.pth", "x.gguf")
    for name in others:
        (remote / name).write_bytes(b"not wanted")
    assert from_pretrained("someone/tiny").model.generation.stop_tokens == (1, 2)
    assert {path.name for path in (remote.parent / "snapshot").iterdir()} == wanted


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_files_where_there_are_no_others(remote: Path, shards: int) -> None:
    write_pytorch(remote, random_tensors(CONFIG), shards=shards)
    (remote / "modeling_x.py").write_bytes(b"not wanted")
    from_pretrained("someone/tiny")
    names = {path.name for path in remote.iterdir()}
    assert {path.name for path in (remote.parent / "snapshot").iterdir()} == names - {"modeling_x.py"}


def test_errors_of_the_network_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("No route to host. Try again later.\nAnd again.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    assert message("someone/tiny").endswith("nor on the hub or in its cache: No route to host")


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of `someone/tiny` in the hub's cache, with no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return repository / "snapshots" / "abc"


def test_safetensors(snapshot: Path) -> None:
    write_checkpoint(snapshot, CONFIG, random_tensors(CONFIG))
    source = open_source("someone/tiny")
    assert (source.form, source.path) == ("Hugging Face directory, safetensors", snapshot)
    from_pretrained("someone/tiny")


def test_pytorch(snapshot: Path) -> None:
    write_pytorch(snapshot, random_tensors(CONFIG), shards=2)
    assert open_source("someone/tiny").form == "Hugging Face directory, PyTorch"
    from_pretrained("someone/tiny")


@pytest.mark.parametrize("hub_id", ["someone/tiny", "someone/absent", "absent"])
def test_what_is_not_in_the_cache(snapshot: Path, hub_id: str) -> None:
    assert "Cannot find an appropriate cached snapshot" in message(hub_id)


def test_weights_are_not_in_the_cache(snapshot: Path) -> None:
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConversionError, match="none of the forms that can be read"):
        from_pretrained("someone/tiny")
