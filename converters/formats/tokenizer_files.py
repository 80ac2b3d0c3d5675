"""The files of a tokenizer, as transformers 4 and 5 and the programs that build on them read them."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from spqr_jax.storage import tokenizer_files
from spqr_jax.storage.json_files import read_json, write_json

CLASS = "PreTrainedTokenizerFast"
"""The class of every `tokenizer.json`; transformers 5 writes its new name, which version 4 does not know."""

_EXTRA = "extra_special_tokens"
"""A list in transformers 5, whose name in version 4 is `additional_special_tokens`; both read that."""


_INPUTS = ["input_ids", "attention_mask"]
"""Entries of an encoded text. The default of version 4 adds `token_type_ids`, which no decoder takes."""


def write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the chat template.

    Example:
      >>> write_tokenizer(Path("tokenizer"), tokenizer)
      >>> json.loads(Path("tokenizer/tokenizer_config.json").read_text())["tokenizer_class"]
      'PreTrainedTokenizerFast'
    """
    tokenizer_files.write_tokenizer(directory, tokenizer)
    path = directory / "tokenizer_config.json"
    content = {"model_input_names": _INPUTS} | read_json(path) | {"tokenizer_class": CLASS}
    if isinstance(content.get(_EXTRA), list):
        content["additional_special_tokens"] = content.pop(_EXTRA)
    write_json(path, content)
