"""Repositories of the Hugging Face hub: downloads the files of a checkpoint into the cache that all tools share."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError

from converters.errors import ConversionError

_DESCRIPTION = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_PYTORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def download_checkpoint(hub_id: str) -> Path:
    """Downloads a repository's configuration, tokenizer and weights, but no code; returns their directory.

    The `.bin` files of a repository are downloaded only if it has no safetensors. The cache and `HF_HUB_OFFLINE` are
    respected.

    Raises:
      ConversionError: the repository is neither on the hub nor in the cache, or not accessible to this user.

    Example:
      >>> download_checkpoint("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
      PosixPath('/home/…/snapshots/93efa2f097d58c2a74874c7e644dbc9b0cee75a2')
    """
    directory = _snapshot(hub_id, (*_DESCRIPTION, *_SAFETENSORS))
    if any(directory.glob("model*.safetensors")):
        return directory
    return _snapshot(hub_id, (*_DESCRIPTION, *_PYTORCH))


def download_description(hub_id: str) -> Path:
    """Downloads a repository's configuration and tokenizer; returns their directory.

    Raises:
      ConversionError: as for `download_checkpoint`.

    Example:
      >>> download_description("HuggingFaceTB/SmolLM2-135M") / "config.json"  # doctest: +SKIP
      PosixPath('/home/…/snapshots/93efa2f097d58c2a74874c7e644dbc9b0cee75a2/config.json')
    """
    return _snapshot(hub_id, _DESCRIPTION)


def _snapshot(hub_id: str, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        reason = "there is no such repository, or it is open only to users who have logged in and accepted its terms"
        raise ConversionError(_nowhere(hub_id, reason)) from error
    except Exception as error:  # besides its own errors, those of the HTTP library
        first_sentence = re.split(r"\n|\. ", str(error).strip())[0].rstrip(".")
        raise ConversionError(_nowhere(hub_id, first_sentence or type(error).__name__)) from error


def _nowhere(hub_id: str, reason: str) -> str:
    return f"{hub_id} is neither a file nor a directory, nor on the hub or in its cache: {reason}"
