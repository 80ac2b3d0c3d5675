"""Files that PyTorch's `save` wrote, read without running code from them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.errors import ConversionError


def load_torch(path: Path) -> object:
    """Reads a `.bin`, `.pt` or `.pth` file; its tensors are mapped from the file into host memory.

    Only PyTorch's own `weights_only` reader is used, which builds tensors and plain containers and nothing else.

    Raises:
      ConversionError: PyTorch is not installed, or the file is missing, damaged (its checksums are compared first) or
        holds objects other than tensors, numbers, strings and containers of them.

    Example:
      >>> load_torch(Path("pytorch_model.bin")).keys()  # doctest: +SKIP
      dict_keys(['model.embed_tokens.weight', ...])
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path} is a PyTorch file, and PyTorch is not installed: run pip install torch, or use safetensors"
        ) from error
    try:
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ConversionError(f"{path} is damaged: the checksum of {damaged} in it is wrong; copy it again")
        # Files older than PyTorch 1.6 are no archives, and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is damaged, or holds objects other than tensors, which are not loaded because they could run code"
        ) from error
    except Exception as error:  # the unpickler and the archive readers raise errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(f"{path} cannot be read as PyTorch weights: {reason[:300]}") from error


def to_numpy(tensor: Any) -> np.ndarray:
    """A dense torch tensor as an array of the same type, bfloat16 included."""
    import torch

    tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
