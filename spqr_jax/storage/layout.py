"""Names of the files and directories in a checkpoint."""

from os import PathLike

from spqr_jax.storage.paths import absolute

DESCRIPTION = "spqr.json"
MANIFEST = "manifest.json"
PARAMS = "params"
TOKENIZER = "tokenizer"
RECORD = "quantization.json"
CARD = "README.md"

ALL = frozenset({DESCRIPTION, MANIFEST, PARAMS, TOKENIZER, RECORD, CARD})


def is_checkpoint(path: str | PathLike[str]) -> bool:
    """Whether a path is a directory that `save` wrote, judged by its `spqr.json`.

    Example:
      >>> is_checkpoint("tiny-spqr"), is_checkpoint("HuggingFaceTB/SmolLM2-135M")
      (True, False)
    """
    return (absolute(path) / DESCRIPTION).is_file()
