"""Divergence of a quantized model's next-token distributions from the original's."""

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
from spqr_jax.models.overflow import describe_overflow, first_overflow
from spqr_jax.models.unpacked import for_measuring
from spqr_jax.runtime.x64 import steps_in_32_bits


class Divergence(NamedTuple):
    """Means over positions, for next-token distributions p of the original and q of the quantized model.

    Attributes:
      kl: mean of Σ_v p(v) log(p(v) / q(v)), in nats.
      agreement: share of positions at which p and q have the same likeliest token.
    """

    kl: float
    agreement: float


@steps_in_32_bits
def window_divergences(
    model: Decoder, original: Params, quantized: Params, windows: Int[np.ndarray, "windows window"]
) -> Iterator[Divergence]:
    """Yields the divergence over each window.

    Args:
      model: the language model.
      original: its parameters.
      quantized: parameters to compare with them, dense or packed.
      windows: token ids, see `cut_windows`.

    Raises:
      SpqrError: a window exceeds the model's positions, an id is outside the vocabulary, or, while iterating, a
        divergence is not finite.

    Example:
      >>> mean_divergence(list(window_divergences(model, params, quantized, calibration[:2])))
      Divergence(kl=0.8..., agreement=0.6...)
    """
    check_windows(model, windows)
    original, quantized = (for_measuring(params) for params in (original, quantized))

    def divergences() -> Iterator[Divergence]:
        for index, tokens in enumerate(windows):
            divergence = Divergence(*map(float, _divergence(model, original, quantized, tokens)))
            if not np.isfinite(divergence.kl):
                overflows = first_overflow(model, original, tokens[None]) is not None
                name, params = ("original", original) if overflows else ("quantized", quantized)
                where = describe_overflow(model, params, tokens[None])
                raise SpqrError(
                    f"the divergence of window {index} is {divergence.kl}, because in the {name} model {where}"
                )
            yield divergence

    return divergences()


def mean_divergence(divergences: list[Divergence]) -> Divergence:
    """Means over windows of equal length."""
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
