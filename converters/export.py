"""Writes models as directories that other programs read: ordinary Hugging Face, and official SpQR."""

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from jaxtyping import Float32
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from converters.errors import ConversionError
from converters.families.table import family_of
from converters.formats.generation_config import FILE as GENERATION
from converters.formats.generation_config import SPECIAL
from converters.formats.official.hf_spqr import ADDED
from converters.formats.official.quantized_matrix import weight_in_order
from converters.formats.official.tiles import encode_tensor
from converters.formats.safetensors import INDEX, SINGLE
from converters.formats.source import CONFIG
from converters.formats.tokenizer_files import write_tokenizer
from converters.pretrained import open_pretrained
from pallas_kernels import SpqrTensor
from pallas_kernels.format.stacks import element
from spqr_jax.models import Decoder
from spqr_jax.models.decoder import Params
from spqr_jax.models.ending import ENDS
from spqr_jax.models.layers import mesh_of
from spqr_jax.models.stacked_blocks import unstack_blocks
from spqr_jax.prompts import end_tokens
from spqr_jax.storage.digests import identical
from spqr_jax.storage.directories import existing_parent, new_directory
from spqr_jax.storage.json_files import write_json
from spqr_jax.storage.layout import CARD
from spqr_jax.storage.model_card import UNKNOWN, Form, Origin, model_card
from spqr_jax.storage.parts import entries_of
from spqr_jax.storage.paths import resolved

SHARD_BYTES = 5_000_000_000

_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "path/to/this/directory"
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
print(tokenizer.decode(model.generate(**tokenizer("The sky is", return_tensors="pt"), max_new_tokens=20)[0]))"""
_CONVERTERS = """from converters import from_pretrained
from spqr_jax import generate

model, params, tokenizer = from_pretrained("path/to/this/directory")
print(tokenizer.decode(generate(model, params, [tokenizer.encode("The sky is")], max_new_tokens=20)[0]))"""

HUGGING_FACE = Form("transformers", "All weights are dense.", _TRANSFORMERS)
"""An ordinary Hugging Face checkpoint."""

OFFICIAL = Form(
    "transformers",
    "The quantized matrices are packed, in the official SpQR format.",
    _CONVERTERS,
    'It needs spqr-jax, `pip install "spqr-jax[models]"`; transformers loads it too, with the package `spqr_quant`.',
)
"""The official SpQR format."""

Named = tuple[str, np.ndarray | SpqrTensor]


def export_huggingface(
    directory: str | PathLike[str],
    model: Decoder,
    params: Params,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] | None = None,
    origin: Origin = UNKNOWN,
) -> None:
    """Writes an ordinary Hugging Face checkpoint, packed matrices dequantized: ŵ = scale · (code − zero) + residual.

    Args:
      directory: the directory to write, which must not exist.
      model: the Flax module.
      params: its parameters, dense, packed or partly so.
      tokenizer: written too, if given.
      dtype: type of all weights; None for the model's own.
      origin: base model and record of the quantization, for the model card.

    Raises:
      ConversionError: the directory exists, writing failed, projections are fused, matrices are split over devices, or
        a weight overflows `dtype`.

    Example:
      >>> model, params, tokenizer = load("tiny-spqr")
      >>> export_huggingface("dequantized", model, params, tokenizer=tokenizer, dtype="bfloat16")
      >>> from_pretrained("dequantized").model == model
      True
    """
    kind = jnp.dtype(dtype or model.dtype).name
    config = family_of(model).to_huggingface(model.config) | {"torch_dtype": kind}
    tensors = ((name, _dense(name, leaf, kind)) for name, leaf in _weights(model, params))
    form = HUGGING_FACE._replace(stored=f"All weights are stored in {kind}, quantized ones dequantized.")
    _write(directory, model, config, tensors, tokenizer, _card(model, params, form, origin))


def export_hf_spqr(
    directory: str | PathLike[str],
    model: Decoder,
    params: Params,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    origin: Origin = UNKNOWN,
) -> None:
    """Writes a checkpoint in the official SpQR format, as transformers and the package `spqr_quant` load it.

    The official reader adds an outlier's value to the weight of the code beneath it. The values written are those for
    which that sum is the outlier's weight. The official writer stores the weight itself, so
    `"outlier_values": "added"` in the quantization configuration marks the difference for this library's reader.

    Args:
      directory: the directory to write, which must not exist.
      model: the Flax module.
      params: its parameters; packed matrices must have 3 bits, groups of 16, 3-bit statistics in groups of 16.
      tokenizer: written too, if given.
      origin: base model and record of the quantization, for the model card.

    Raises:
      ConversionError: the directory exists, writing failed, projections are fused, matrices are split over devices, no
        matrix is packed, one is packed in another format, or one has a bias or is of an expert, which the official
        module lacks.

    Example:
      >>> quantized, _ = quantize(params, None, model=model, config=SpqrConfig(outlier_threshold=None))
      >>> export_hf_spqr("hf-spqr", model, quantized, tokenizer=tokenizer)
      >>> open_pretrained("hf-spqr").parts["layers_0"]()["q_proj"]["kernel"].bits
      3
    """
    _check_no_experts(model)
    weights = dict(_weights(model, params))
    packed = {name.removesuffix(".weight"): leaf for name, leaf in weights.items() if isinstance(leaf, SpqrTensor)}
    if not packed:
        raise ConversionError("the model holds no packed matrix; quantize it first")
    arrays: dict[str, np.ndarray] = {}
    for module, tensor in packed.items():
        if f"{module}.bias" in weights:
            raise ConversionError(f"{module} has a bias, which the official SpQR format cannot hold")
        arrays |= {f"{module}.{field}": array for field, array in encode_tensor(tensor, module).items()}
    dense = {name: leaf for name, leaf in weights.items() if not isinstance(leaf, SpqrTensor)}
    quantization = {
        "quant_method": "spqr",
        "bits": 3,
        "beta1": 16,
        "beta2": 16,
        **ADDED,
        "modules_to_not_convert": sorted(
            {"lm_head"} | {n.removesuffix(".weight") for n, a in dense.items() if a.ndim == 2}
        ),
        "shapes": {f"{name}.shape": len(array) for name, array in arrays.items()},
    }
    config = family_of(model).to_huggingface(model.config)
    config |= {"torch_dtype": "float16", "quantization_config": quantization}
    tensors = ((name, _dense(name, leaf, jnp.float16)) for name, leaf in dense.items())
    card = _card(model, params, OFFICIAL, origin)
    _write(directory, model, config, [*arrays.items(), *tensors], tokenizer, card)


def _card(model: Decoder, params: Params, form: Form, origin: Origin) -> str:
    _check_whole(params)
    return model_card(model, entries_of(params), form, origin)


def _weights(model: Decoder, params: Params) -> Iterator[Named]:
    """Yields Hugging Face's name of each tensor with its array, in PyTorch's orientation, or its packed matrix.

    A packed embedding or head is dequantized: other formats have it dense.
    """
    _check_whole(params)
    flat = flatten_dict(unstack_blocks(params))
    for target in family_of(model).layout(model.config, "huggingface").targets:
        if target.path not in flat:
            raise ConversionError(
                f"{'.'.join(target.path)} is missing; where projections are fused, export the original parameters"
            )
        leaf = flat[target.path]
        if target.place is not None:
            leaf = element(leaf, target.place[0]) if isinstance(leaf, SpqrTensor) else leaf[target.place[0]]
        if target.path[0] in ENDS and isinstance(leaf, SpqrTensor):
            yield target.source, _dequantized(leaf)[: target.shape[0]]
        else:
            yield target.source, leaf.T if target.path[-1] == "kernel" and not isinstance(leaf, SpqrTensor) else leaf


def _check_whole(params: Params) -> None:
    if mesh_of(params) is not None:
        raise ConversionError("the parameters are split over devices; export those they were made from")


def _check_no_experts(model: Decoder) -> None:
    if model.new_block().experts():
        name = type(model).__name__
        raise ConversionError(f"a {name} has experts, which the official SpQR format cannot hold: export it as hf")


def _dense(name: str, leaf: np.ndarray | SpqrTensor, dtype: DTypeLike) -> np.ndarray:
    weight = _dequantized(leaf) if isinstance(leaf, SpqrTensor) else np.asarray(leaf)
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(weight.astype(dtype))
    if not np.isfinite(result.astype(np.float32)).all():
        largest = np.abs(weight.astype(np.float32)).max()
        raise ConversionError(f"{name} has a weight of {largest:g}, too large for {jnp.dtype(dtype).name}")
    return result


def _dequantized(tensor: SpqrTensor) -> Float32[np.ndarray, "out in"]:
    weight = weight_in_order(tensor)
    return weight if tensor.permutation is None else weight[:, np.argsort(np.asarray(tensor.permutation))]


def _write(
    directory: str | PathLike[str],
    model: Decoder,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: PreTrainedTokenizerFast | None,
    card: str,
) -> None:
    """Writes a complete directory or none: two configurations, tensors in one file or shards, tokenizer and card.

    Everything is read back before the directory gets its name.
    """
    destination = resolved(directory)
    if destination.exists():
        raise ConversionError(f"{destination} exists already; choose another path")
    try:
        with new_directory(destination) as incomplete:
            if tokenizer is not None:
                write_tokenizer(incomplete, tokenizer)
            options = model.generation.ending_with(end_tokens(model, tokenizer)).content
            if model.generation.content:
                write_json(incomplete / GENERATION, options)
            write_json(incomplete / CONFIG, config | _special_tokens(options, tokenizer))
            _write_shards(incomplete, tensors)
            (incomplete / CARD).write_text(card, encoding="utf-8")
            for read in open_pretrained(incomplete, dtype=config["torch_dtype"]).parts.values():
                read()
    except ConversionError:
        raise
    except Exception as error:  # on a full disk: OSError, or errors of the Rust libraries
        parent = existing_parent(destination)
        raise ConversionError(f"{destination} could not be written: {error}; look at the space in {parent}") from error


def _special_tokens(options: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> dict[str, Any]:
    """Entries of `config.json`, without which transformers would end a text at the family's default tokens."""
    special = {name: options.get(name) for name in SPECIAL}
    if tokenizer is not None:
        for name in ("bos_token_id", "pad_token_id"):
            found = getattr(tokenizer, name)
            special[name] = special.get(name) if found is None else found
    return special


def _write_shards(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes shards, one in memory at a time; their number is known at the end, and so are their names."""
    names: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        file = directory / f"shard-{len(names)}"
        save_file(shard, file, metadata={"format": "pt"})
        _compare(file, shard)
        names.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
    if len(names) == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for index, in_shard in enumerate(names):
        name = f"model-{index + 1:05}-of-{len(names):05}.safetensors"
        (directory / f"shard-{index}").rename(directory / name)
        weight_map |= dict.fromkeys(in_shard, name)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _compare(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises a ConversionError that names the first tensor that differs from the one in the file."""
    with safe_open(file, framework="numpy") as stored:
        for name, tensor in tensors.items():
            if not identical(stored.get_tensor(name), tensor):
                raise ConversionError(f"{file} does not have the {name} that was written to it: choose another disk")


def _shards(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, array in tensors:
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = array
    yield shard
