"""SpQR in JAX: quantize, evaluate, save, load and run a language model.

Public names are imported when they are first used, so that `spqr --version` takes no seconds and a missing package is
reported in one line.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from spqr_jax._version import find_version

# transformers, used for its tokenizers, otherwise recommends at import to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from spqr_jax._public import (
        COMPACT,
        NEAR_LOSSLESS,
        SMALL,
        CheckpointError,
        MatrixReport,
        SpqrConfig,
        SpqrError,
        SpqrTensor,
        bits_per_weight,
        fuse_projections,
        generate,
        load,
        open_checkpoint,
        perplexity,
        quantize,
        quantize_blocks,
        quantize_checkpoint,
        quantize_matrix,
        save,
        shard_params,
        spqr_dequantize,
        summarize,
    )

__all__ = [
    "COMPACT",
    "NEAR_LOSSLESS",
    "SMALL",
    "CheckpointError",
    "MatrixReport",
    "SpqrConfig",
    "SpqrError",
    "SpqrTensor",
    "bits_per_weight",
    "fuse_projections",
    "generate",
    "load",
    "open_checkpoint",
    "perplexity",
    "quantize",
    "quantize_blocks",
    "quantize_checkpoint",
    "quantize_matrix",
    "save",
    "shard_params",
    "spqr_dequantize",
    "summarize",
]

__version__ = find_version()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module("spqr_jax._public"), name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        message = f'spqr_jax.{name} needs {package}: pip install "spqr-jax[models]"'
        raise ModuleNotFoundError(message, name=error.name, path=error.path) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
