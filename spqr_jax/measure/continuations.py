"""Greedy continuations of a quantized model: agreement with the original's, and perplexity under the original."""

import numpy as np
from jaxtyping import Int

from spqr_jax.generation import generate
from spqr_jax.measure.perplexity import counted_perplexity, token_losses
from spqr_jax.models.decoder import Decoder, Params


def agreement_lengths(
    continuations: Int[np.ndarray, "prompts new"], others: Int[np.ndarray, "prompts new"]
) -> Int[np.ndarray, " prompts"]:
    """Number of equal tokens at the start of each pair of continuations.

    Example:
      >>> agreement_lengths(np.array([[5, 6, 7], [8, 9, 1]]), np.array([[5, 6, 8], [8, 9, 1]]))
      array([2, 3])
    """
    return np.cumprod(continuations == others, axis=1).sum(axis=1)


def continuation_perplexity(
    model: Decoder,
    params: Params,
    prompts: Int[np.ndarray, "prompts tokens"],
    continuations: Int[np.ndarray, "prompts new"],
) -> float:
    """exp of the mean loss −log p(token | all earlier tokens) over the continuations' tokens.

    With the original's parameters and the quantized model's text, it measures the distance of that text from the
    original's predictions.

    Args:
      model: the language model.
      params: the parameters that predict.
      prompts: token ids of prompts of equal length.
      continuations: the token ids after each prompt.

    Raises:
      SpqrError: as `token_losses`.

    Example:
      >>> prompts = calibration[:2, :8]
      >>> continuations = continue_greedily(model, quantized, prompts, 4)
      >>> continuation_perplexity(model, params, prompts, continuations) > 1
      True
    """
    new = continuations.shape[1]
    windows = np.concatenate([prompts, continuations], axis=1).astype(np.int32)
    return counted_perplexity(token_losses(model, params, windows), [new] * len(windows))


def continue_greedily(
    model: Decoder, params: Params, prompts: Int[np.ndarray, "prompts tokens"], new_tokens: int
) -> Int[np.ndarray, "prompts new"]:
    """Appends the likeliest token to each prompt again and again, past ends of texts too.

    Raises:
      SpqrError: as `generate`.

    Example:
      >>> continue_greedily(model, params, np.array([[50, 35]]), 3).shape
      (1, 3)
    """
    return np.array(generate(model, params, prompts, max_new_tokens=new_tokens, stop_tokens=()))
