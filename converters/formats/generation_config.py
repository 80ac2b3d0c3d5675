"""The generation configuration of checkpoints of other projects, with all tokens that end a text."""

from converters.errors import ConversionError
from converters.formats.source import Source
from pallas_kernels.errors import SpqrError
from spqr_jax.models.generation_options import END, GenerationOptions, token_ids
from spqr_jax.storage.json_files import read_json

FILE = "generation_config.json"

SPECIAL = ("bos_token_id", END, "pad_token_id")
"""Entries that may stand in `config.json` as well."""

_GGUF_ENDS = tuple(f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
_GGUF_OTHERS = {"bos_token_id": "tokenizer.ggml.bos_token_id", "pad_token_id": "tokenizer.ggml.padding_token_id"}


def generation_options(source: Source) -> GenerationOptions:
    """The content of `generation_config.json`, with what `config.json` or GGUF's keys add to it.

    A text ends at every token that either file calls its end. GGUF has up to three: the end of a text, of a turn
    (`eot`) and of a message (`eom`).

    Raises:
      ConversionError: the file is not JSON, or its `eos_token_id` is neither an id nor a list of ids.

    Example:
      >>> from converters.formats.detect import open_source
      >>> generation_options(open_source("HuggingFaceTB/SmolLM2-135M")).stop_tokens
      ()
    """
    if source.naming == "gguf":
        keys = source.metadata
        others = {name: keys[key] for name, key in _GGUF_OTHERS.items() if key in keys}
        return GenerationOptions.of(others).ending_with(
            token for key in _GGUF_ENDS for token in token_ids(keys.get(key))
        )
    path = source.description.parent / FILE
    try:
        own = read_json(path) if path.is_file() else {}
        special = {name: source.metadata[name] for name in SPECIAL if source.metadata.get(name) is not None}
        missing = {name: value for name, value in special.items() if own.get(name) is None}
        return GenerationOptions.of({**own, **missing}).ending_with(token_ids(special.get(END)))
    except SpqrError as error:
        named = error if str(path) in str(error) else f"{path.parent}: {error}"
        raise ConversionError(str(named)) from error
