"""Detects the form of checkpoints of other projects."""

from os import PathLike

from converters.errors import ConversionError
from converters.formats import hub, pytorch, safetensors
from converters.formats.gguf import file as gguf
from converters.formats.official import directory, hf_spqr
from converters.formats.source import CONFIG, Form, Source
from spqr_jax.storage.checkpoint import is_checkpoint
from spqr_jax.storage.paths import absolute

FORMS: tuple[Form, ...] = (
    gguf.FORM,
    directory.FORM,
    hf_spqr.FORM,
    safetensors.FORM,
    pytorch.FORM,
)
"""All forms, one line each; the first that detects itself opens the path."""


def open_source(path_or_hub_id: str | PathLike[str]) -> Source:
    """Detects the form of a checkpoint, and lists its content.

    Args:
      path_or_hub_id: a GGUF file; a directory with `config.json` and `model.safetensors` or `pytorch_model.bin` (or an
        index and its shards), dense or packed by SpQR; a directory that the official SpQR code has written; or a
        repository of the Hugging Face hub.

    Raises:
      ConversionError: the path does not exist, it has none of these forms, or a file is missing or damaged.

    Example:
      >>> open_source("HuggingFaceTB/SmolLM2-135M").form
      'Hugging Face directory, safetensors'
    """
    # Absolute, because tensors are read later, perhaps in another working directory.
    path = absolute(path_or_hub_id)
    if not path.exists():
        path = hub.download_checkpoint(str(path_or_hub_id))
    for form in FORMS:
        if form.detect(path):
            return form.open(path)
    if is_checkpoint(path):
        raise ConversionError(f"{path} is a checkpoint of this project, which spqr_jax.load reads")
    advice = f"give the directory with its {CONFIG}" if path.is_file() else "of a GGUF file, give its own path"
    signs = ", ".join(form.signs for form in FORMS)
    raise ConversionError(f"{path} has none of the forms that can be read ({signs}); {advice}")
