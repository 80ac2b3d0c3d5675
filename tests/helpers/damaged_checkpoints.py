"""Checkpoints of every form, and reading them with damage: refused, or read as the files have it."""

import faulthandler
import functools
import json
import os
import re
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.byte_tokenizer import byte_tokenizer
from helpers.damage import damage
from helpers.official_goldens import unpack_directories
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint, write_gguf

from converters import ConversionError, from_pretrained
from converters.formats.official.hf_spqr import ADDED
from converters.formats.official.quantized_matrix import StoredOutliers, StoredStatistics
from converters.formats.official.tiles import TiledMatrix, encode_arrays
from pallas_kernels import SpqrTensor

CONFIG = tiny_config(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
TENSORS = random_tensors(CONFIG)

# Checkpoints of every form


def sharded(directory: Path) -> None:
    write_checkpoint(directory, CONFIG, TENSORS, shards=2)


def with_tokenizer(directory: Path) -> None:
    write_checkpoint(directory, CONFIG, TENSORS)
    byte_tokenizer().save_pretrained(directory)


def pytorch(directory: Path) -> None:
    import torch

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
    torch.save(tensors, directory / "pytorch_model.bin")


def gguf_of(kind: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        directory.mkdir()
        write_gguf(directory / "model.gguf", CONFIG, TENSORS, kind=gguf.GGMLQuantizationType[kind])

    return write


def hf_spqr(directory: Path) -> None:
    tensors = {name: tensor.astype(np.float16) for name, tensor in TENSORS.items() if "_proj" not in name}
    lengths = {}
    for name, tensor in TENSORS.items():
        if "_proj" in name:
            arrays = encode_arrays(random_matrix(*tensor.shape, np.random.default_rng(0)))
            parts = {f"{name.removesuffix('.weight')}.{part}": array for part, array in arrays.items()}
            lengths |= {f"{part}.shape": array.size for part, array in parts.items()}
            tensors |= parts
    quantization = {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": lengths, **ADDED}
    write_checkpoint(directory, {**CONFIG, "quantization_config": quantization}, tensors)


def random_matrix(out: int, columns: int, rng: np.random.Generator) -> TiledMatrix:
    """One outlier in each row."""

    def statistics() -> StoredStatistics:
        scale, zero = rng.uniform(0.1, 1, (2, out // 16, columns // 16)).astype(np.float16)
        return StoredStatistics(rng.integers(8, size=(out, columns // 16), dtype=np.uint8), scale, zero)

    values = rng.normal(size=out).astype(np.float16)
    outliers = StoredOutliers(np.arange(out + 1), rng.integers(columns, size=out, dtype=np.uint16), values)
    codes = rng.integers(8, size=(out, columns), dtype=np.uint8)
    return TiledMatrix(codes, statistics(), statistics(), outliers, rng.permutation(columns).astype(np.uint16))


def official(directory: Path) -> None:
    """The first of the two blocks of a golden."""
    import torch

    unpack_directories(directory.parent / "goldens")
    shutil.move(directory.parent / "goldens" / "llama", directory)
    shutil.rmtree(directory / "1")
    others = torch.load(directory / "not_quantized_weights.pt")
    one_block = {name: tensor for name, tensor in others.items() if ".layers.1." not in name}
    torch.save(one_block, directory / "not_quantized_weights.pt")
    (directory / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=1)))


FORMS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda directory: write_checkpoint(directory, CONFIG, TENSORS),
    "sharded": sharded,
    "tokenizer": with_tokenizer,
    "gguf": gguf_of("F32"),
    "gguf_q8_0": gguf_of("Q8_0"),
    "hf_spqr": hf_spqr,
    "pytorch": pytorch,
    "official": official,
}
NEED_TORCH = {"pytorch", "official"}


def written(root: Path, form: str) -> Path:
    """The directory of a checkpoint, written when it is first asked for."""
    if form in NEED_TORCH:
        pytest.importorskip("torch")
    if not (root / form).exists():
        FORMS[form](root / form)
    return root / form


# What must come of a damaged one

GGUF_MODULES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"{part}_proj": f"attn_{part}" for part in "qkv"},
    "o_proj": "attn_output",
    **{f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
# In messages about contradictions between files, and about values.
TENSOR = re.compile(r"tensors|\.weight|\w+_proj|dense_weights|row_offsets|col_vals|in_perm")

Stored = tuple[str, tuple[int, ...], bytes, Any]


def read(directory: Path) -> dict[tuple[str, ...], np.ndarray | SpqrTensor]:
    params = from_pretrained(next(directory.glob("*.gguf"), directory)).params
    return flatten_dict(params, is_leaf=lambda _, value: isinstance(value, SpqrTensor))


undamaged = functools.cache(read)


def try_damage(original: Path, random: Random, copy: Path) -> str:
    """Damages one file of a copy and reads that; `refused` or `read`, if what had to come of it did."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    pattern = "token*" if original.name == "tokenizer" else "*"
    file = random.choice(sorted(path for path in copy.rglob(pattern) if path.is_file()))
    has_checksums = file.read_bytes()[:2] == b"PK"
    by_value = damage(file, random)
    try:
        found = read(copy)
    except ConversionError as error:
        message = str(error)
        assert str(copy) in message, message
        assert file.name in message or TENSOR.search(message), message
        return "refused"
    expected = undamaged(original)
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in expected.items()}
    changed = [path for path, leaf in found.items() if not same(leaf, expected[path])]
    if original.name in NEED_TORCH:
        assert not changed or (has_checksums and by_value)
    elif changed:
        assert_as_in_the_files({path: found[path] for path in changed}, stored(original), stored(copy))
    return "read"


def same(a: Any, b: Any) -> bool:
    arrays = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(*arrays, strict=True)
    )


def assert_as_in_the_files(
    changed: dict[tuple[str, ...], Any], before: dict[str, Stored], after: dict[str, Stored]
) -> None:
    """Parameters have changed because the files have, and to the values that are there now."""
    for path, leaf in changed.items():
        modules = {path[-2], GGUF_MODULES[path[-2]]}
        names = [name for name in after if name.split(".")[-2] in modules]
        assert any(after[name] != before[name] for name in names), path
        if isinstance(leaf, SpqrTensor):
            assert all(np.isfinite(part).all() for part in jax.tree.leaves(leaf))
        else:
            ((kind, _, content, _),) = (after[name] for name in names)
            values = np.frombuffer(content, np.float16 if kind == "F16" else np.float32).astype(np.float32)
            # The bits, for -0 too; GGUF has rows in another order.
            np.testing.assert_array_equal(np.sort(leaf.ravel().view(np.int32)), np.sort(values.view(np.int32)))


def stored(directory: Path) -> dict[str, Stored]:
    """Type, shape and bytes of each tensor, read in another way; and how outliers are meant."""
    if (path := directory / "model.gguf").exists():
        tensors = gguf.GGUFReader(path).tensors
        with np.errstate(all="ignore"):
            values = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
        return {name: ("F32", value.shape, value.tobytes(), None) for name, value in values.items()}
    config = json.loads((directory / "config.json").read_bytes())
    outliers = (config.get("quantization_config") or {}).get("outlier_values")
    if (path := directory / "model.safetensors").exists():
        return safetensors_content(path, outliers)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_bytes())["weight_map"]
    files = {file: safetensors_content(directory / file, outliers) for file in set(weight_map.values())}
    return {name: files[file][name] for name, file in weight_map.items() if name in files[file]}


def safetensors_content(path: Path, outliers: Any) -> dict[str, Stored]:
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    places = {name: slice(*(data + offset for offset in entry["data_offsets"])) for name, entry in header.items()}
    return {
        name: (entry["dtype"], tuple(entry["shape"]), content[places[name]], outliers) for name, entry in header.items()
    }


def batch(root: Path, forms: list[str], count: int) -> None:
    """Damages from a list of seeds, in a process whose memory is limited; prints each before it is tried."""
    for form in forms:
        undamaged(root / form)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, resource.RLIM_INFINITY))
    for form in forms:
        outcomes: Counter[str] = Counter()
        for seed in range(count):
            print(form, seed, flush=True)
            faulthandler.dump_traceback_later(60, exit=True)
            start = time.monotonic()
            outcomes[try_damage(root / form, Random(seed), root / "copy")] += 1
            assert time.monotonic() - start < 10
        assert outcomes.keys() == {"refused", "read"}, outcomes
