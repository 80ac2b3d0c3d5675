"""Texts to measure on, as the commands take them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.calibration import read_texts
from spqr_jax.cli.models import require
from spqr_jax.cli.public_texts import Use
from spqr_jax.measure.paper_texts import Protocol, protocol_tokens


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerFast | None, texts: Sequence[str] | None, protocol: Protocol | None, window: int
) -> Int[np.ndarray, " tokens"]:
    """Token ids of texts, of a protocol's text, or of the start of WikiText-2's test text.

    Args:
      tokenizer: of the model; None if it has none.
      texts: files or names of public texts, see `calibration`; none for the package's text.
      protocol: one of the papers' texts, in place of these.
      window: tokens per window, which some protocols need to cut documents.

    Raises:
      SpqrError: both texts and a protocol are given, a text cannot be read, or there is no tokenizer.
    """
    if protocol is None:
        return np.concatenate([ids.reshape(-1) for ids in read_texts(tokenizer, texts, Use.MEASURE)])
    if texts:
        raise SpqrError(f"give --text {texts[0]} or --protocol {protocol}, not both")
    return protocol_tokens(protocol, require(tokenizer), window)
