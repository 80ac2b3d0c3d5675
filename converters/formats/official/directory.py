"""Reads directories that the official SpQR code's `main.py --save` writes.

`<block>/<sublayer>`, such as `0/self_attn.q_proj`, holds one quantized matrix, `not_quantized_weights.pt` all other
parameters under their full names, and `args.pt` the settings of the run. They do not hold the
model's configuration and tokenizer.
"""

import math
import os.path
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from converters.errors import ConversionError
from converters.formats import hub
from converters.formats.official.quantized_matrix import (
    Statistics,
    StoredOutliers,
    StoredStatistics,
    check_outliers,
    check_permutation,
    quantized_tensor,
)
from converters.formats.pytorch import stored_tensor
from converters.formats.source import CONFIG, Form, Source
from converters.formats.torch_files import load_torch
from converters.layout import PACKED, StoredTensor
from pallas_kernels import SpqrTensor, check_format
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.tensor import BITS
from spqr_jax.storage.json_files import read_json

_ARGUMENTS = "args.pt"
_UNQUANTIZED = "not_quantized_weights.pt"

_SETTINGS = ["model_path", "wbits", "qq_scale_bits", "qq_zero_bits", "qq_groupsize"]

# Content of the file of a matrix; statistics are lists with one tensor for each group of columns.
_LISTS = {"scale": "quant_layer_scale", "zero": "quant_layer_zeros"}
_SECOND_LEVEL = [f"quant_layer_{kind}_qq_{part}" for kind in _LISTS for part in ("scale", "zero")]
_PARTS = ["weight_shape", "groupsize", "quant_weights", "outliers_matrix", "perm", *_LISTS.values(), *_SECOND_LEVEL]


Content = Mapping[str, Any]
"""Values in a file, checked where they are read."""


class OfficialDirectory(NamedTuple):
    """Content of such a directory.

    Attributes:
      tensors: all parameters under Hugging Face's names; matrices are packed, and stay in their
        files until they are read.
      model: the directory or hub id where the configuration and the tokenizer are: this directory, if a
        `config.json` was copied into it, else the model that was quantized.
    """

    tensors: dict[str, StoredTensor]
    model: str


def is_official_directory(directory: Path) -> bool:
    """Whether a directory looks like one that the official code has written."""
    return (directory / _ARGUMENTS).is_file() and (directory / _UNQUANTIZED).is_file()


def open_official_directory(directory: Path) -> OfficialDirectory:
    """Lists the tensors in a directory.

    Matrices equal those of the official reader in Python (at outliers the stored value, elsewhere
    scale · (code − zero)) up to the rounding to float16 of statistics and of the outliers' residuals. Codes of 6 and 7
    bits are held in 8, those of 1 bit in 2.

    Raises:
      ConversionError: a file is missing or damaged, or does not determine the names of the blocks.
    """
    arguments = _load(directory / _ARGUMENTS, _SETTINGS)
    _require_integer(arguments, "qq_groupsize", directory / _ARGUMENTS)
    path = directory / _UNQUANTIZED
    tensors = {str(name): stored_tensor(tensor, str(name), path) for name, tensor in _load(path, []).items()}
    prefix = _block_prefix(tensors, path)
    for path in sorted(directory.glob("*/*")):
        if path.parent.name.isdecimal():
            name = f"{prefix}{path.parent.name}.{path.name}.weight"
            shape = _load_matrix(path)["weight_shape"]
            tensors[name] = StoredTensor(tuple(shape), PACKED, partial(_read_matrix, path, arguments))
    has_config = (directory / "config.json").is_file()
    return OfficialDirectory(tensors, str(directory if has_config else arguments["model_path"]))


def _load(path: Path, keys: Iterable[str]) -> Content:
    if not path.is_file():
        raise ConversionError(f"{path} is missing")
    content = load_torch(path)
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a dict")
    if missing := [key for key in keys if key not in content]:
        raise ConversionError(f"{path} lacks {', '.join(missing)}")
    return content


def _block_prefix(names: Iterable[str], path: Path) -> str:
    """Prefix of the number of a block: `model.layers.` in LLaMA, `transformer.h.` in Falcon."""
    prefixes = sorted({match[1] for name in names if (match := re.match(r"(.*?\.)\d+\.", name))})
    if len(prefixes) != 1:
        raise ConversionError(
            f"{path} must hold norms that show how blocks are named, but the names in it begin with "
            f"{' and '.join(prefixes) or 'nothing'} before a number"
        )
    return prefixes[0]


def _load_matrix(path: Path) -> Content:
    content = _load(path, _PARTS)
    _require_integer(content, "groupsize", path)
    shape = content["weight_shape"]
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        raise ConversionError(f"{path}: weight_shape is {shape!r}, not two integers")
    for key in (*_LISTS.values(), *_SECOND_LEVEL):
        if not isinstance(content[key], list):
            raise ConversionError(f"{path}: {key} is a {type(content[key]).__name__}, not a list")
    return content


def _require_integer(content: Content, key: str, path: Path) -> None:
    if not isinstance(content[key], int):
        raise ConversionError(f"{path}: {key} is {content[key]!r}, not an integer")


def _read_matrix(path: Path, arguments: Content) -> SpqrTensor:
    content = _load_matrix(path)
    out, in_features = content["weight_shape"]
    group_size, stats_group_size = content["groupsize"], arguments["qq_groupsize"]
    quantized = {kind: bool(content[f"quant_layer_{kind}_qq_scale"]) for kind in _LISTS}
    scale_bits, zero_bits = (_width(arguments, f"qq_{k}_bits", path) if quantized[k] else None for k in _LISTS)
    bits = _width(arguments, "wbits", path)
    try:
        check_format(
            out,
            in_features,
            bits=bits,
            group_size=group_size,
            scale_bits=scale_bits,
            zero_bits=zero_bits,
            stats_group_size=stats_group_size,
        )
    except SpqrError as error:
        raise ConversionError(f"{path}: {error}") from error
    groups = in_features // group_size
    codes = _array(content["quant_weights"], (out, in_features), "quant_weights", path)
    permutation = _array(content["perm"], (in_features,), "perm", path)
    check_permutation(permutation, str(path))
    return quantized_tensor(
        _in_range(codes, arguments["wbits"], f"{path}: quant_weights"),
        _statistics(content, "scale", (out, groups), arguments, path),
        _statistics(content, "zero", (out, groups), arguments, path),
        _outliers(content["outliers_matrix"], (out, in_features), path),
        permutation,
        name=str(path),
        bits=bits,
        group_size=group_size,
        scale_bits=scale_bits,
        zero_bits=zero_bits,
    )


def _array(tensor: object, shape: tuple[int, ...], name: str, path: Path) -> np.ndarray:
    stored = stored_tensor(tensor, name, path)
    if stored.shape != shape:
        raise ConversionError(f"{path}: {name} is {list(stored.shape)}, but must be {list(shape)}")
    return stored.read_array()


def _width(arguments: Content, key: str, path: Path) -> int:
    """The narrowest width of codes that holds those of a setting."""
    bits = arguments[key]
    if not isinstance(bits, int) or bits not in range(1, max(BITS) + 1):
        raise ConversionError(f"{path.parent.parent / _ARGUMENTS}: {key} is {bits!r}, but must be 1 to {max(BITS)}")
    return min(width for width in BITS if width >= bits)


def _statistics(
    content: Content,
    kind: Literal["scale", "zero"],
    shape: tuple[int, int],
    arguments: Content,
    path: Path,
) -> Statistics:
    """Scales or zeros of all groups; the official code quantizes either, both or none of them."""
    second_level = f"quant_layer_{kind}_qq"
    values = _side_by_side(content[_LISTS[kind]], shape, _LISTS[kind], path)
    if not content[f"{second_level}_scale"]:
        if values.dtype == np.int8:
            raise ConversionError(f"{path}: {_LISTS[kind]} has codes, but {second_level}_scale is empty")
        return values.astype(np.float32)
    codes = _in_range(values, arguments[f"qq_{kind}_bits"], f"{path}: {_LISTS[kind]}")
    coarse = shape[0] // arguments["qq_groupsize"], shape[1]
    scale, zero = (
        _side_by_side(content[f"{second_level}_{part}"], coarse, f"{second_level}_{part}", path).astype(np.float32)
        for part in ("scale", "zero")
    )
    return StoredStatistics(codes, scale, zero)


def _side_by_side(
    tensors: Iterable[object], shape: tuple[int, int], name: str, path: Path
) -> Shaped[np.ndarray, "rows groups"]:
    """One column of the result for each tensor, whatever its shape."""
    columns = [stored_tensor(tensor, name, path) for tensor in tensors]
    lengths = sorted({math.prod(column.shape) for column in columns})
    if len(columns) != shape[1] or lengths != [shape[0]]:
        raise ConversionError(
            f"{path}: {name} has {len(columns)} tensors of {' or '.join(map(str, lengths))} entries, "
            f"but must have {shape[1]} of {shape[0]}"
        )
    return np.stack([column.read_array().reshape(-1) for column in columns], axis=1)


def _in_range(values: Shaped[np.ndarray, "rows columns"], bits: int, name: str) -> UInt8[np.ndarray, "rows columns"]:
    """Codes from the int8 in which they are stored, where those over 127 have wrapped around."""
    if values.dtype != np.int8:
        raise ConversionError(f"{name} has the type {values.dtype}, but must be int8")
    codes = np.ascontiguousarray(values).view(np.uint8)
    if codes.max() >= 2**bits:
        raise ConversionError(f"{name} has codes up to {codes.max()}, more than {bits} bits can hold")
    return codes


def _outliers(matrix: Any, shape: tuple[int, int], path: Path) -> StoredOutliers:
    """A sparse torch matrix in CSR form; as in the official reader, zeros in it are no outliers."""
    # The rows of a sparse tensor may be dense.
    if not getattr(matrix, "is_sparse", False) or tuple(matrix.shape) != shape or matrix.sparse_dim() != 2:
        raise ConversionError(f"{path}: outliers_matrix is not a sparse matrix of shape {list(shape)}")
    matrix = matrix.coalesce()
    values = stored_tensor(matrix.values(), "outliers_matrix", path).read_array().astype(np.float32)
    (rows, columns), values = matrix.indices().numpy()[:, values != 0], values[values != 0]
    offsets = np.searchsorted(rows, np.arange(shape[0] + 1))
    outliers = StoredOutliers(offsets, columns, values)
    check_outliers(outliers, shape[1], str(path))
    return outliers


def _open_source(directory: Path) -> Source:
    tensors, model = open_official_directory(directory)
    description = _directory_of(model, directory) / CONFIG
    return Source(FORM.name, directory, description, read_json(description, ConversionError), tensors)


def _directory_of(model: str, directory: Path) -> Path:
    """The directory with configuration and tokenizer of the model that was quantized."""
    if os.path.isdir(model):  # false also for a name that no directory can have
        return Path(model)
    try:
        return hub.download_description(model)
    except ConversionError as error:
        raise ConversionError(
            f"{directory} has no {CONFIG}, and neither is there one at {model}, where by its {_ARGUMENTS} the model "
            f"came from; copy the model's {CONFIG} and tokenizer files into the directory"
        ) from error


FORM: Form = Form("official SpQR directory", f"{_ARGUMENTS} with {_UNQUANTIZED}", is_official_directory, _open_source)
