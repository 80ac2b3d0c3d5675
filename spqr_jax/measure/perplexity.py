"""Perplexity of a language model on a text."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from pallas_kernels.errors import SpqrError
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.overflow import describe_overflow
from spqr_jax.models.token_ids import check_vocabulary
from spqr_jax.models.unpacked import for_measuring
from spqr_jax.runtime.x64 import steps_in_32_bits
from spqr_jax.texts import begun_with, token_ids, tokens_of_text

HEAD_POSITIONS = 256
"""Positions whose logits are in memory at once: those of a whole window may take hundreds of megabytes."""

WINDOWS_AT_ONCE = 4
"""Most windows in a batch, where their number divides: packed matrices are unpacked once per batch."""


def perplexity(
    model: Decoder,
    params: Params,
    tokens: ArrayLike,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
) -> float:
    """exp of the mean next-token loss over the windows of a text.

    exp( 1/n Σ_w 1/(window − 1) Σ_t −log p(token_{w,t+1} | token_{w,0}, …, token_{w,t}) ): each window is read without
    earlier windows, the protocol of the GPTQ and SpQR papers. With a stride, windows overlap, and each token counts
    once, in the first window that predicts it. After the first window it has at least window − stride earlier tokens.

    Args:
      model: the language model.
      params: its parameters, dense or packed.
      tokens: ids of the text: `[tokens]`, `[1, tokens]`, or lists of ids, which are joined.
      window: tokens per window.
      stride: tokens from the start of one window to the start of the next; None for adjacent windows.
      max_windows: use at most this number of windows.

    Raises:
      SpqrError: as `counted_windows` and `token_losses`.

    Example:
      >>> perplexity(model, params, tokenizer.encode(text), window=64, max_windows=2) > 1
      True
    """
    first = model.first_token
    windows, counted = counted_windows(tokens, window=window, stride=stride, max_windows=max_windows, first=first)
    return counted_perplexity(token_losses(model, params, windows), counted)


def counted_perplexity(losses: Iterable[Float[np.ndarray, " _"]], counted: Iterable[int]) -> float:
    """exp of the mean over windows' losses, `counted` of them at the end of each window.

    Example:
      >>> counted_perplexity([np.array([3.0, 1.0]), np.array([0.0, 1.0])], [2, 1])
      5.29...
    """
    kept = [window[-new:] for window, new in zip(losses, counted, strict=True)]
    return float(np.exp(np.mean(np.concatenate(kept), dtype=np.float64)))


def cut_windows(
    tokens: ArrayLike, *, window: int = 1024, max_windows: int | None = None, first: int | None = None
) -> Int[np.ndarray, "windows window"]:
    """Cuts a text into adjacent windows; an incomplete window at its end is dropped.

    Args:
      tokens: ids of the text: `[tokens]`, `[1, tokens]`, or lists of ids, which are joined.
      window: tokens per window.
      max_windows: use at most this number of windows.
      first: token in front of each window, and one of its tokens, see `Decoder.first_token`.

    Raises:
      SpqrError: the ids are not integers, `window` or `max_windows` is out of its range, or the text is shorter than
        one window.

    Example:
      >>> cut_windows([5, 6, 7, 8, 9], window=2)
      array([[5, 6],
             [7, 8]], dtype=int32)
    """
    tokens = token_ids(tokens)
    if window < 2:
        raise SpqrError(f"window is {window}, but must be at least 2, because the first token has no loss")
    if max_windows is not None and max_windows < 1:
        raise SpqrError(f"max_windows is {max_windows}, but must be at least 1")
    length = tokens_of_text(window, first)
    if len(tokens) < length:
        raise SpqrError(f"the text has {len(tokens)} tokens, fewer than one window of {length}: give a longer text")
    count = len(tokens) // length
    return begun_with(first, tokens[: count * length].reshape(count, length)[:max_windows])


def counted_windows(
    tokens: ArrayLike,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    first: int | None = None,
) -> tuple[Int[np.ndarray, "windows window"], list[int]]:
    """Windows of a text, and the number of losses that count at the end of each.

    Args:
      tokens: ids of the text: `[tokens]`, `[1, tokens]`, or lists of ids, which are joined.
      window: tokens per window.
      stride: tokens from one start to the next, with the last window at the end of the text; None gives `cut_windows`.
      max_windows: use at most this number of windows.
      first: token in front of each window, and one of its tokens, see `Decoder.first_token`.

    Returns:
      The windows, and for each the number of tokens at its end that no earlier window predicts.

    Raises:
      SpqrError: as `cut_windows`, or `stride` is not between 1 and window − 1.

    Example:
      >>> counted_windows([5, 6, 7, 8, 9, 10], window=4, stride=3)
      (array([[ 5,  6,  7,  8],
              [ 7,  8,  9, 10]], dtype=int32), [3, 2])
    """
    windows = cut_windows(tokens, window=window, max_windows=max_windows, first=first)
    if stride is None:
        return windows, [window - 1] * len(windows)
    if not 1 <= stride < window:
        raise SpqrError(f"stride is {stride}, but must be between 1 and {window - 1}, so that windows overlap")
    tokens = token_ids(tokens)
    length = tokens_of_text(window, first)
    last = len(tokens) - length
    starts = [*range(0, last, stride), last][:max_windows]
    counted = [window - 1, *(after - before for before, after in itertools.pairwise(starts))]
    return begun_with(first, np.stack([tokens[start : start + length] for start in starts])), counted


def window_losses(model: Decoder, params: Params, windows: Int[np.ndarray, "windows window"]) -> Iterator[float]:
    """Yields each window's mean next-token loss, in nats, so that callers can show progress.

    Takes the arguments, and raises the errors, of `token_losses`.

    Example:
      >>> [round(loss) for loss in window_losses(model, params, calibration[:2])]  # random weights
      [30, 32]
    """
    return (float(np.mean(losses, dtype=np.float64)) for losses in token_losses(model, params, windows))


@steps_in_32_bits
def token_losses(
    model: Decoder, params: Params, windows: Int[np.ndarray, "windows window"]
) -> Iterator[Float[np.ndarray, " window-1"]]:
    """Yields the losses −log p(token_{t+1} | token_0, …, token_t) of each window, in nats.

    Args:
      model: the language model.
      params: its parameters, dense or packed.
      windows: token ids, see `cut_windows`.

    Raises:
      SpqrError: a window exceeds the model's positions, an id is outside the vocabulary, or, while iterating, a loss is
        not finite; the message names the block where the pass overflowed.

    Example:
      >>> [losses.shape for losses in token_losses(model, params, calibration[:2])]
      [(63,), (63,)]
    """
    check_windows(model, windows)
    # Move parameters to the device once, not once per window.
    params = for_measuring(params)

    def losses() -> Iterator[np.ndarray]:
        at_once = math.gcd(len(windows), WINDOWS_AT_ONCE)
        for start in range(0, len(windows), at_once):
            batch = np.asarray(_losses(model, params, windows[start : start + at_once]))
            for index, loss in enumerate(batch, start):
                if not np.isfinite(loss).all():
                    where = describe_overflow(model, params, windows[index : index + 1])
                    raise SpqrError(f"the loss of window {index} is {loss.mean()}, because {where}")
                yield loss

    return losses()


def check_windows(model: Decoder, windows: Int[np.ndarray, "windows window"]) -> None:
    """Raises a SpqrError where windows exceed a model's positions, or have an id outside its vocabulary."""
    length, positions = windows.shape[1], model.config.max_positions
    if length > positions:
        raise SpqrError(f"a window of {length} tokens exceeds the {positions} positions of the model: shorten it")
    check_vocabulary(windows, model.config.vocab_size)


@partial(jax.jit, static_argnames="model")
def _losses(model: Decoder, params: Params, tokens: Int[Array, "batch window"]) -> Float[Array, "batch window-1"]:
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    hidden, _ = apply(tokens, method="hidden_states")

    def loss(position: tuple[Float[Array, " hidden"], Int[Array, ""]]) -> Float[Array, ""]:
        features, following = position
        logits = apply(features, method="head")
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), following)

    # Logits of a few positions at a time: less memory, and faster too.
    # Nothing follows the last token, where roll wraps around: that loss is dropped.
    positions = hidden.reshape(-1, hidden.shape[-1]), jnp.roll(tokens, -1, axis=1).reshape(-1)
    return jax.lax.map(loss, positions, batch_size=HEAD_POSITIONS).reshape(tokens.shape)[:, :-1]
