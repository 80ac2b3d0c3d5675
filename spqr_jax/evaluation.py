"""Perplexity of a language model on a text."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.stacking import stack_blocks
from spqr_jax.vocabulary import check_vocabulary

# Positions whose logits are in memory at once.
_HEAD_POSITIONS = 256


def perplexity(
    model: Decoder, params: Params, tokens: ArrayLike, *, window: int = 1024, max_windows: int | None = None
) -> float:
    """exp of the mean, over the windows of a text, of the windows' mean next-token losses.

    exp( 1/n Σ_w 1/(window − 1) Σ_t −log p(token_{w,t+1} | token_{w,0}, …, token_{w,t}) ): each window is read without
    the ones before it, the protocol of the GPTQ and SpQR papers.

    Args:
      model: the language model.
      params: its parameters, dense or packed.
      tokens: ids of the text, one-dimensional.
      window: tokens per window.
      max_windows: use only the first so many windows.

    Raises:
      ValueError: what `cut_windows` and `window_losses` raise.

    Example:
      >>> perplexity(model, params, tokenizer.encode(text), window=1024)
      23.3
    """
    windows = cut_windows(tokens, window=window, max_windows=max_windows)
    losses = list(window_losses(model, params, windows))
    return float(np.exp(np.mean(losses, dtype=np.float64)))


def cut_windows(
    tokens: ArrayLike, *, window: int = 1024, max_windows: int | None = None
) -> Int[np.ndarray, "windows window"]:
    """Cuts a text into consecutive windows; what is left over at its end is dropped.

    Args:
      tokens: ids of the text, one-dimensional.
      window: tokens per window.
      max_windows: use only the first so many windows.

    Raises:
      ValueError: `window` or `max_windows` is out of its range, or the text is shorter than one window.

    Example:
      >>> cut_windows([5, 6, 7, 8, 9], window=2)
      array([[5, 6], [7, 8]], dtype=int32)
    """
    tokens = np.asarray(tokens)
    if window < 2:
        raise ValueError(f"window is {window}, but a loss needs at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is {max_windows}, but must be at least 1")
    if len(tokens) < window:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {window}")
    count = len(tokens) // window
    return tokens[: count * window].reshape(count, window)[:max_windows].astype(np.int32)


def window_losses(model: Decoder, params: Params, windows: Int[np.ndarray, "windows window"]) -> Iterator[float]:
    """Yields each window's mean next-token loss, in nats; consumed one by one, it shows progress.

    Args:
      model: the language model.
      params: its parameters, dense or packed.
      windows: token ids, as `cut_windows` gives them.

    Raises:
      ValueError: a window is longer than the model has positions for, an id is outside the vocabulary, or, while
        iterating, a loss is not finite.

    Example:
      >>> losses = list(tqdm(window_losses(model, params, windows), total=len(windows)))
      >>> math.exp(statistics.fmean(losses))  # the perplexity
    """
    length, positions = windows.shape[1], model.config.max_positions
    if length > positions:
        raise ValueError(f"a window of {length} tokens exceeds the {positions} positions of the model")
    check_vocabulary(windows, model.config.vocab_size)
    # On the device once, not once per window.
    params = jax.device_put(stack_blocks(params))

    def losses() -> Iterator[float]:
        for index, tokens in enumerate(windows):
            loss = float(_loss(model, params, tokens))
            if not np.isfinite(loss):
                raise ValueError(f"the loss of window {index} is {loss}")
            yield loss

    return losses()


@partial(jax.jit, static_argnames="model")
def _loss(model: Decoder, params: Params, tokens: Int[Array, " window"]) -> Float[Array, ""]:
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    hidden, _ = apply(tokens[None], method="hidden_states")

    def loss(position: tuple[Float[Array, " hidden"], Int[Array, ""]]) -> Float[Array, ""]:
        features, following = position
        logits = apply(features, method="head")
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), following)

    # The logits of a whole window may be hundreds of megabytes; a part of them at a time is faster, too.
    # Nothing follows the last token: roll wraps around there, and that loss is dropped.
    losses = jax.lax.map(loss, (hidden[0], jnp.roll(tokens, -1)), batch_size=_HEAD_POSITIONS)
    return losses[:-1].mean()
