"""Texts to measure on, as the commands take them."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.models import encode_text, require
from spqr_jax.measure.paper_texts import Protocol, protocol_tokens


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerFast | None, text: Path | None, protocol: Protocol | None, window: int
) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text file, of a protocol's text, or of the start of WikiText-2's test text.

    Args:
      tokenizer: of the model; None if it has none.
      text: file; None for the package's text.
      protocol: one of the papers' texts, in place of a file.
      window: tokens per window, which some protocols need to cut documents.

    Raises:
      SpqrError: both a file and a protocol are given, the text cannot be read, or there is no tokenizer.
    """
    if protocol is None:
        return np.array(encode_text(tokenizer, text, "test"))
    if text is not None:
        raise SpqrError(f"give --text {text} or --protocol {protocol}, not both")
    return protocol_tokens(protocol, require(tokenizer), window)
