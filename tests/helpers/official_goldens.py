"""Matrices that the official SpQR code has written, and what it reads out of them.

`packed_official`: two matrices of SmolLM2-135M's first block, quantized and then packed by the official tools, with the
official CPU reader's weights (for q_proj only their SHA-256).

`official_directory`: directories as the official `main.py --save` leaves them (commit 543d10e). Its solver was run on
the linear layers of tiny random LLaMAs with random inputs, in a loop of our own around it, because its own is for old
versions of transformers. `expected.npz` has the weights that the official reader in Python gives; in `wide` and
`mixed`, which it misreads or refuses, those of the official solver.
"""

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from pallas_kernels import SpqrTensor
from pallas_kernels.backends.xla import dequantize_in_order

DEQUANTIZE = jax.jit(dequantize_in_order)
GOLDENS = Path(__file__).parents[1] / "goldens"
FULL = "dequantized_fp16_permuted_order"
DENSE_ONLY = "dequantized_dense_only_fp16_permuted_order"


def weight_in_order(tensor: SpqrTensor) -> np.ndarray:
    """What `dequantize_in_order` gives, compiled once for all numbers of outliers."""
    weight = np.array(DEQUANTIZE(replace(tensor, outliers=None)))
    if (outliers := tensor.outliers) is not None:
        rows = np.repeat(np.arange(len(weight)), np.diff(outliers.offsets))
        weight[rows, outliers.columns] += outliers.values.astype(np.float32)
    return weight


def packed_matrix(name: str) -> tuple[dict[str, np.ndarray], tuple[int, int], dict[str, np.ndarray]]:
    """The four arrays with CSR outliers, the matrix's shape, and everything in the file."""
    with np.load(GOLDENS / "packed_official" / f"{name}.npz") as file:
        content = dict(file)
    arrays = {part: content[part] for part in ("dense_weights", "row_offsets", "col_vals", "in_perm")}
    return arrays, tuple(content["shape"].tolist()), content


def in_ptcsr(content: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same four arrays with PTCSR outliers."""
    return {
        "dense_weights": content["dense_weights"],
        "row_offsets": content["ptcsr_row_offsets"],
        "col_vals": content["ptcsr_col_vals"],
        "in_perm": content["in_perm"],
    }


def assert_same_bits(weight: np.ndarray, content: dict[str, np.ndarray], key: str) -> None:
    """Compares float16 weights with those of the official reader."""
    assert weight.dtype == np.float16
    if key in content:
        np.testing.assert_array_equal(weight.view(np.uint16), content[key].view(np.uint16))
    else:
        assert hashlib.sha256(weight.tobytes()).hexdigest() == content[f"{key}_sha256"]


def unpack_directories(destination: Path) -> Path:
    with tarfile.open(GOLDENS / "official_directory" / "directories.tar.xz") as archive:
        archive.extractall(destination, filter="data")
    return destination


def expected_weights(case: str) -> dict[str, np.ndarray]:
    """Float32 weights of one directory, by `block/sublayer`."""
    with np.load(GOLDENS / "official_directory" / "expected.npz") as file:
        return {
            name.removeprefix(f"{case}/"): file[name].astype(np.float32) for name in file if name.startswith(f"{case}/")
        }
