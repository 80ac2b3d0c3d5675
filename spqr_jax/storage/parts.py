"""Parts of a checkpoint: what stands under one name at the top of the parameter tree, such as `layers_0`.

Each part is a directory of its own, so it is written when its block is finished, and read without the others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pallas_kernels import SpqrTensor, trim
from spqr_jax.models.decoder import Params
from spqr_jax.models.stacked_blocks import unstack_blocks
from spqr_jax.storage.description import ArrayEntry, Description, Entries, MatrixEntry
from spqr_jax.storage.layout import PARAMS
from spqr_jax.storage.orbax_arrays import read_arrays, write_arrays

Leaf = SpqrTensor | np.ndarray


def write_part(root: Path, name: str, part: Params) -> Entries:
    """Writes one part, its outliers trimmed, and returns its entries in `spqr.json`."""
    leaves = host_leaves({name: part})
    arrays = _arrays(leaves)
    if stored := {path: array for path, array in arrays.items() if array.size}:
        write_arrays(root / PARAMS / name, stored)
    return _entries(leaves, arrays)


def entries_of(params: Params) -> Entries:
    """The entries of parameters, as `write_part` returns them, without writing anything.

    Example:
      >>> entries_of(quantized)["matrices"]["layers_0.q_proj.kernel"]["bits"]
      4
    """
    leaves = host_leaves(params)
    return _entries(leaves, _arrays(leaves))


def _entries(leaves: Mapping[str, Leaf], arrays: Mapping[str, np.ndarray]) -> Entries:
    return {
        "matrices": {path: _matrix_entry(leaf) for path, leaf in leaves.items() if isinstance(leaf, SpqrTensor)},
        "dense": {path: _array_entry(leaf) for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)},
        "empty": {path: _array_entry(array) for path, array in arrays.items() if array.size == 0},
    }


def read_part(root: Path, description: Description, name: str) -> Params:
    """Reads one part into host memory."""
    directory = root / PARAMS / name
    arrays = read_arrays(directory) if directory.exists() else {}
    for path, empty in description["empty"].items():
        arrays[path] = np.zeros(empty["shape"], jnp.dtype(empty["dtype"]))
    leaves: dict[str, Leaf] = {path: arrays[path] for path in description["dense"] if _part(path) == name}
    for path, entry in description["matrices"].items():
        if _part(path) == name:
            fields = _under(path, arrays)
            leaves[path] = SpqrTensor.from_arrays(
                fields, in_features=entry["shape"][-1], group_size=entry["group_size"]
            )
    return unflatten_dict(leaves, sep=".")[name]


def part_names(description: Description) -> list[str]:
    """Names of all parts."""
    return sorted({_part(path) for path in (*description["dense"], *description["matrices"])})


def host_leaves(params: Params) -> dict[str, Leaf]:
    """Path → packed matrix or array, in host memory and without padding."""
    flat = flatten_dict(unstack_blocks(params), sep=".")
    trimmed = {path: trim(leaf) if isinstance(leaf, SpqrTensor) else leaf for path, leaf in flat.items()}
    return jax.tree.map(np.asarray, jax.device_get(trimmed))


def _part(path: str) -> str:
    return path.partition(".")[0]


def _under(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The arrays of one packed matrix, by the names of its fields."""
    prefix = f"{path}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _arrays(leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """Path → array, those of a packed matrix under its path and field."""
    tree = {path: leaf.arrays() if isinstance(leaf, SpqrTensor) else leaf for path, leaf in leaves.items()}
    return flatten_dict(tree, sep=".")


def _matrix_entry(tensor: SpqrTensor) -> MatrixEntry:
    return {
        "shape": (*tensor.stack, *tensor.shape),
        "bits": tensor.bits,
        "group_size": tensor.group_size,
        "scale_bits": None if tensor.scale_codes is None else tensor.scale_codes.shape[-3],
        "zero_bits": None if tensor.zero_codes is None else tensor.zero_codes.shape[-3],
        "outliers": None if tensor.outliers is None else int(np.sum(tensor.outliers.count)),
        "bytes": tensor.nbytes,
    }


def _array_entry(array: np.ndarray) -> ArrayEntry:
    return {"shape": array.shape, "dtype": array.dtype.name, "bytes": array.nbytes}
