"""The tensors of `pytorch_model.bin` files, under the type names of safetensors."""

from functools import partial
from pathlib import Path

from converters.errors import ConversionError
from converters.formats.shards import holds, index_of, open_shards
from converters.formats.source import Form, huggingface_source
from converters.formats.torch_files import load_torch, to_numpy
from converters.layout import StoredTensor

SINGLE = "pytorch_model.bin"

_KINDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def open_pytorch(directory: Path) -> dict[str, StoredTensor]:
    """Names, shapes and readers of all tensors in `directory`; they stay in their files until they are read.

    Raises:
      ConversionError: PyTorch is not installed, there is no `pytorch_model.bin`, or a file is missing, damaged or holds
        something else than a dict of dense tensors.

    Example:
      >>> open_pytorch(directory)["model.norm.weight"].kind  # doctest: +SKIP
      'BF16'
    """
    return open_shards(directory, SINGLE, _open_file)


def _open_file(path: Path) -> dict[str, StoredTensor]:
    content = load_torch(path)
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a dict from names to tensors")
    return {str(name): stored_tensor(value, str(name), path) for name, value in content.items()}


def stored_tensor(value: object, name: str, path: Path) -> StoredTensor:
    """A value in a PyTorch file as a tensor, if it is dense and of a type that safetensors has too.

    Raises:
      ConversionError: it is something else; the message names file, name and type.

    Example:
      >>> import torch
      >>> stored_tensor(torch.ones(3, dtype=torch.bfloat16), "model.norm.weight", Path("pytorch_model.bin")).kind
      'BF16'
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise ConversionError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
    if value.is_meta or value.is_nested:
        what = "a tensor without its numbers" if value.is_meta else "a nested tensor"
        raise ConversionError(f"{path}: {name} is {what}, which is not supported")
    kind = _KINDS.get(str(value.dtype).removeprefix("torch."))
    if kind is None or value.layout is not torch.strided:
        raise ConversionError(f"{path}: {name} is of {value.dtype} and {value.layout}, which is not supported")
    return StoredTensor(tuple(value.shape), kind, partial(to_numpy, value))


FORM: Form = Form(
    "Hugging Face directory, PyTorch",
    f"{SINGLE} or {index_of(SINGLE)}",
    lambda path: holds(path, SINGLE),
    lambda path: huggingface_source(FORM.name, path, open_pytorch),
)
