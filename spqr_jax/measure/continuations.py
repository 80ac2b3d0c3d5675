"""How a quantized model's own text compares: how long it says what the original says, and how likely that finds it."""

import numpy as np
from jaxtyping import Int

from spqr_jax.generation import generate
from spqr_jax.measure.perplexity import counted_perplexity, token_losses
from spqr_jax.models.decoder import Decoder, Params


def agreement_lengths(
    continuations: Int[np.ndarray, "prompts new"], others: Int[np.ndarray, "prompts new"]
) -> Int[np.ndarray, " prompts"]:
    """How many tokens at the start of each continuation are those of the other one.

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
    """exp of the mean loss −log p(token | all before it) of the continuations' tokens.

    With the original's parameters and text that the quantized model wrote, it says how far the text has gone from what
    the original would say.

    Args:
      model: the language model.
      params: parameters of the model that judges.
      prompts: token ids of prompts of equal length.
      continuations: the token ids that follow each.

    Raises:
      SpqrError: what `token_losses` raises.

    Example:
      >>> continuation_perplexity(model, params, prompts, continue_greedily(model, quantized, prompts, 64))
      1.9
    """
    new = continuations.shape[1]
    windows = np.concatenate([prompts, continuations], axis=1).astype(np.int32)
    return counted_perplexity(token_losses(model, params, windows), [new] * len(windows))


def continue_greedily(
    model: Decoder, params: Params, prompts: Int[np.ndarray, "prompts tokens"], new_tokens: int
) -> Int[np.ndarray, "prompts new"]:
    """The likeliest tokens after each prompt, one after the other, whatever they are.

    Raises:
      SpqrError: what `generate` raises.

    Example:
      >>> continue_greedily(model, params, np.array([[504, 3575]]), 3)
      array([[ 282, 4649,  314]])
    """
    return np.array(generate(model, params, prompts.tolist(), max_new_tokens=new_tokens))
