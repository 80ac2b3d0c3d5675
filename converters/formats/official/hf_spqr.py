"""Reads Hugging Face checkpoints in the official SpQR format: `quant_method` `spqr` in `config.json`.

Every quantized `<module>` has four tensors, `<module>.dense_weights` and so on (see `tiles`), and
`quantization_config.shapes` gives their lengths. The shape of a matrix is not stored: it follows from the lengths.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from converters.errors import ConversionError
from converters.formats.official.outliers import ROWS
from converters.formats.official.tiles import BITS, TILE, TYPES, decode_tensor
from converters.formats.options import Options, require_neutral
from converters.formats.pytorch import FORM as PYTORCH
from converters.formats.safetensors import FORM as SAFETENSORS
from converters.formats.source import CONFIG, Form, Source
from converters.layout import PACKED, StoredTensor
from pallas_kernels import SpqrTensor
from pallas_kernels.format.tensor import MAX_COLUMNS
from spqr_jax.storage.json_files import read_json

_NEUTRAL = {
    "quant_method": ("spqr",),
    "bits": (None, BITS),
    "beta1": (None, TILE),
    "beta2": (None, TILE),
    "outlier_values": (None, "added"),
}
_KNOWN = {*_NEUTRAL, "modules_to_not_convert", "shapes"}

ADDED = {"outlier_values": "added"}
"""Marks, in a quantization configuration, that outliers are stored as `tiles.encode_tensor` writes."""


def open_hf_spqr(
    stored: Mapping[str, StoredTensor], quantization_config: Options, directory: Path
) -> dict[str, StoredTensor]:
    """Replaces the four tensors of each module by one packed matrix, `<module>.weight`, which stays in its file.

    An outlier's weight is its stored value, as the official writer means it; the official reader for GPUs is off by
    the weight of the code beneath. Where the configuration has `ADDED`, it is the sum of both.

    Args:
      stored: all tensors of the checkpoint.
      quantization_config: that object in `config.json`.
      directory: where they are, for error messages.

    Raises:
      ConversionError: settings that are not the format's, tensors that are missing or contradict `shapes` or each
        other.

    Example:
      >>> lengths = {"dense_weights": 16, "row_offsets": 17, "col_vals": 0, "in_perm": 8}
      >>> stored = {f"up_proj.{name}": StoredTensor((n,), "I32", lambda: None) for name, n in lengths.items()}
      >>> open_hf_spqr(stored, {"quant_method": "spqr"}, Path("model"))["up_proj.weight"]
      StoredTensor(shape=(16, 16), kind='SpQR', read=...)
    """
    # An unknown setting may be `outlier_values` with a damaged name.
    if unknown := quantization_config.keys() - _KNOWN:
        names = ", ".join(map(repr, sorted(unknown)))
        raise ConversionError(f"{directory / 'config.json'}: quantization_config has unknown settings: {names}")
    try:
        require_neutral({"quant_method": None, **quantization_config}, _NEUTRAL)
    except ConversionError as error:
        raise ConversionError(f"{directory / 'config.json'}: quantization_config: {error}") from error
    added = quantization_config.get("outlier_values") == ADDED["outlier_values"]
    lengths = quantization_config.get("shapes") or {}
    if not isinstance(lengths, dict):
        raise ConversionError(
            f"{directory / 'config.json'}: shapes in quantization_config is {lengths!r}, not an object"
        )
    promised = {key.removesuffix(".shape"): length for key, length in lengths.items()}
    quantized = {name for name in stored.keys() | promised.keys() if _part(name) in TYPES}
    tensors = {name: tensor for name, tensor in stored.items() if name not in quantized}
    for module in sorted({name.rpartition(".")[0] for name in quantized}):
        if f"{module}.weight" in tensors:
            raise ConversionError(f"{directory}: {module} has both weight and dense_weights")
        parts = _parts(module, stored, promised, directory)
        name = f"{directory}: {module}"
        shape = _shape(parts, name)
        tensors[f"{module}.weight"] = StoredTensor(shape, PACKED, partial(_read, parts, shape, name, added))
    return tensors


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _parts(
    module: str, stored: Mapping[str, StoredTensor], promised: Mapping[str, object], directory: Path
) -> dict[str, StoredTensor]:
    """The module's tensors; `in_perm` may be missing unless `shapes` has entries for it."""
    parts = {}
    for part in TYPES:
        name = f"{module}.{part}"
        length = promised.get(name)
        if name in stored:
            parts[part] = stored[name]
            if len(stored[name].shape) != 1 or length not in (None, *stored[name].shape):
                raise ConversionError(
                    f"{directory}: {name} has the shape {list(stored[name].shape)}, but shapes in quantization_config "
                    f"says {length}"
                )
        elif part != "in_perm" or length:
            raise ConversionError(f"{directory}: {name} is missing")
    return parts


def _shape(parts: Mapping[str, StoredTensor], name: str) -> tuple[int, int]:
    """(out, in) of a matrix.

    The product is 16 for every entry of `dense_weights`, and `in_perm` has half as many entries as there are columns.
    Where that is empty, `row_offsets` has one entry more than there are rows (CSR) or sixteenths of the rows (PTCSR).
    Often either gives a possible shape; then it is PTCSR if there are outliers and all offsets are multiples of
    sixteen, which in CSR they would be by a rare chance only.
    """
    weights = TILE * parts["dense_weights"].shape[0]
    offsets = parts["row_offsets"].shape[0] - 1
    if "in_perm" in parts and parts["in_perm"].shape[0]:
        in_features = 2 * parts["in_perm"].shape[0]
        possible = [(weights // in_features, in_features)]
    else:
        possible = [(out, weights // out) for out in (offsets, ROWS * offsets) if out > 0]
    possible = [
        (out, in_features)
        for out, in_features in possible
        if out * in_features == weights and out % TILE == in_features % TILE == 0 and 0 < in_features <= MAX_COLUMNS
    ]
    if not possible:
        lengths = ", ".join(f"{part} {tensor.shape[0]}" for part, tensor in parts.items())
        raise ConversionError(f"{name}: no matrix has tensors of these lengths: {lengths}")
    if len(possible) == 1:
        return possible[0]
    row_offsets = parts["row_offsets"].read_array()
    return possible[bool(row_offsets[-1] and (row_offsets % ROWS == 0).all())]


def _read(parts: Mapping[str, StoredTensor], shape: tuple[int, int], name: str, added: bool) -> SpqrTensor:
    return decode_tensor({part: tensor.read_array() for part, tensor in parts.items()}, shape, name, added=added)


def _dense_form(directory: Path) -> Form | None:
    """The form that the directory would have without its quantization."""
    return next((form for form in (SAFETENSORS, PYTORCH) if form.detect(directory)), None)


def _detect(directory: Path) -> bool:
    if _dense_form(directory) is None:
        return False
    quantization = read_json(directory / CONFIG, ConversionError).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "spqr"


def _open_source(directory: Path) -> Source:
    form = _dense_form(directory)
    assert form is not None
    source = form.open(directory)
    metadata = dict(source.metadata)
    quantization = metadata.pop("quantization_config")
    assert isinstance(quantization, dict)
    tensors = open_hf_spqr(source.tensors, quantization, directory)
    return replace(source, form=FORM.name, metadata=metadata, tensors=tensors)


FORM: Form = Form("Hugging Face directory, SpQR", f"{CONFIG} with quant_method spqr", _detect, _open_source)
