"""The files of a tokenizer."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging


def write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the files of `save_pretrained`; warnings of transformers are shown, although commands hide others.

    `tokenizer.json` is written without line breaks and indentation, which are half of it: 2 MB of SmolLM2.

    Example:
      >>> write_tokenizer(Path("tokenizer"), tokenizer)
      >>> (Path("tokenizer") / "tokenizer.json").is_file()
      True
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))
    try:
        tokenizer.save_pretrained(directory)
    finally:
        logging.set_verbosity(verbosity)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
