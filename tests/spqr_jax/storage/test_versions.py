"""Checkpoints and an unfinished run that earlier releases wrote: this release loads and resumes them.

`goldens/checkpoints/version-<n>.tar.xz` was written by a release of format version n. It has checkpoints, the
directory of a run interrupted after one of its two blocks (`resumed.partial`), and `expected.json` with digests of
arrays and some logits. The dense weights have sixteen values and come from a hash of their names, so they are not
stored.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from pallas_kernels import SpqrTensor
from spqr_jax import SpqrConfig, load, quantize_checkpoint
from spqr_jax.models.decoder import Params
from spqr_jax.storage.description import READ_VERSIONS
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import BlockReport, read_record

GOLDENS = Path(__file__).parents[2] / "goldens" / "checkpoints"
TOKENS = np.random.default_rng(0).integers(0, 31, (4, 8)).astype(np.int32)
RESUMED = "resumed"


def extract(version: int, directory: Path) -> dict[str, Any]:
    """Extracts a version's goldens, and returns the expectations."""
    with tarfile.open(GOLDENS / f"version-{version}.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return json.loads((directory / "expected.json").read_text())


def digest(params: Params) -> str:
    """SHA-256 over paths, types, shapes and bytes of all stored arrays."""
    found = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep=".").items()):
        arrays = leaf.arrays() if isinstance(leaf, SpqrTensor) else {"": leaf}
        for name, array in sorted(arrays.items()):
            found.update(f"{path} {name} {array.dtype} {array.shape}".encode() + np.asarray(array).tobytes())
    return found.hexdigest()


def dense_params(model: Any) -> Params:
    """The weights that the goldens were quantized from."""
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"], sep=".")
    weights = {}
    for path, leaf in shapes.items():
        values = np.frombuffer(hashlib.shake_256(path.encode()).digest(leaf.size), np.uint8) % 16
        weights[path] = values.astype(np.float32).reshape(leaf.shape) / 32 - 0.25 + path.endswith(".scale")
    return unflatten_dict(weights, sep=".")


@pytest.mark.parametrize("version", READ_VERSIONS)
def test_checkpoints_of_a_version_load_bit_for_bit(tmp_path: Path, version: int) -> None:
    expected = extract(version, tmp_path)
    names = sorted(expected.keys() - {RESUMED})
    assert len(names) >= 4
    for name in names:
        model, params, tokenizer = load(tmp_path / name)
        assert digest(params) == expected[name]["arrays"], name
        assert (tokenizer is not None) == expected[name]["tokenizer"]
        assert model.generation.content == expected[name].get("generation", {})
        assert (read_record(tmp_path / name) is not None) == expected[name]["record"]
        logits = np.asarray(jax.jit(model.apply)({"params": params}, TOKENS[:1]), np.float32)[0, -1, :8]
        # Activations in bfloat16 have 8 bits; sums differ between processors.
        tolerance = 0.05 if model.dtype == "bfloat16" else 1e-3
        np.testing.assert_allclose(logits, expected[name]["logits"], rtol=tolerance, atol=tolerance)
    assert sorted(expected) == [
        "falcon-16bit-statistics",
        "falcon-no-outliers",
        "llama-partly-dense",
        "llama-tokenizer",
        "resumed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("version", READ_VERSIONS)
def test_an_unfinished_run_of_a_version_resumes_to_the_same_bits(tmp_path: Path, version: int) -> None:
    expected = extract(version, tmp_path)
    # The run has the model and settings of this checkpoint, but no tokenizer.
    model = load(tmp_path / "llama-tokenizer").model
    parts = {name: (lambda part=part: part) for name, part in dense_params(model).items()}
    finished: list[BlockReport] = []
    reports = quantize_checkpoint(
        ModelSource(model, parts, None),
        tmp_path / RESUMED,
        TOKENS,
        config=SpqrConfig(outlier_threshold=0.1),
        on_block=finished.append,
    )
    assert [block.number for block in finished] == [2]
    assert [block.number for block in reports] == [1, 2]
    assert digest(load(tmp_path / RESUMED).params) == expected[RESUMED]["arrays"]
    assert not (tmp_path / f"{RESUMED}.partial").exists()
