"""How far a quantized model's predictions are from the original's, token by token."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import SpqrError
from spqr_jax.measure.perplexity import HEAD_POSITIONS, check_windows
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.stacked_blocks import stack_blocks


class Divergence(NamedTuple):
    """What a window of text says of two models' next-token distributions, p of the original and q of the other.

    Attributes:
      kl: mean over the positions of Σ_v p(v) log(p(v) / q(v)), in nats.
      agreement: share of the positions at which both hold the same token for the likeliest.
    """

    kl: float
    agreement: float


def window_divergences(
    model: Decoder, original: Params, quantized: Params, windows: Int[np.ndarray, "windows window"]
) -> Iterator[Divergence]:
    """Yields what each window says.

    Args:
      model: the language model.
      original: its parameters.
      quantized: parameters to compare with them, dense or packed.
      windows: token ids, as `cut_windows` gives them.

    Raises:
      SpqrError: a window is longer than the model has positions for, an id is outside the vocabulary, or, while
        iterating, a divergence is not finite.

    Example:
      >>> divergences = list(window_divergences(model, params, quantized, cut_windows(ids)))
      >>> mean_divergence(divergences)
      Divergence(kl=0.13, agreement=0.84)
    """
    check_windows(model, windows)
    original, quantized = (jax.device_put(stack_blocks(params)) for params in (original, quantized))

    def divergences() -> Iterator[Divergence]:
        for index, tokens in enumerate(windows):
            divergence = Divergence(*map(float, _divergence(model, original, quantized, tokens)))
            if not np.isfinite(divergence.kl):
                raise SpqrError(f"the divergence of window {index} is {divergence.kl}")
            yield divergence

    return divergences()


def mean_divergence(divergences: list[Divergence]) -> Divergence:
    """The means over windows of equal length."""
    return Divergence(*np.mean(divergences, axis=0).tolist())


@partial(jax.jit, static_argnames="model")
def _divergence(
    model: Decoder, original: Params, quantized: Params, tokens: Int[Array, " window"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    both = original, quantized

    def apply(params: Params, inputs: Array, method: str) -> Any:
        return model.apply({"params": params}, inputs, method=method)

    def compare(features: tuple[Float[Array, " hidden"], Float[Array, " hidden"]]) -> tuple[Array, Array]:
        logits = [apply(params, f, "head").astype(jnp.float32) for params, f in zip(both, features, strict=True)]
        log_p, log_q = map(jax.nn.log_softmax, logits)
        kl = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
        return kl, jnp.argmax(log_p) == jnp.argmax(log_q)

    hidden = tuple(apply(params, tokens[None], "hidden_states")[0][0] for params in both)
    kl, same = jax.lax.map(compare, hidden, batch_size=HEAD_POSITIONS)
    return kl.mean(), same.mean()
