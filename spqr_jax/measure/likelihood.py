"""Log-likelihoods of continuations of contexts, which multiple-choice tasks compare."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.errors import SpqrError
from spqr_jax.generation import for_decoding, pad_left
from spqr_jax.measure.perplexity import HEAD_POSITIONS
from spqr_jax.models.decoder import Decoder, KVCache, Params, State
from spqr_jax.models.overflow import describe_overflow
from spqr_jax.models.precision import cache_type
from spqr_jax.models.token_ids import check_vocabulary
from spqr_jax.runtime.x64 import steps_in_32_bits

Tokens = tuple[int, ...]


class Likelihood(NamedTuple):
    """Likelihood of one continuation.

    Attributes:
      log: Σ_t log p(token_t | the context and the earlier tokens), in nats.
      greedy: whether each of its tokens is the likeliest, so that greedy decoding generates it.
    """

    log: float
    greedy: bool


@steps_in_32_bits
def likelihoods(
    model: Decoder, params: Params, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 8
) -> Iterator[tuple[int, Likelihood]]:
    """Yields the likelihood of each continuation after its context, longest contexts first.

    Continuations of one context share a batch: the model runs over the context once, and each continuation starts from
    a copy of its KV cache. Widths are powers of two, so few programs are compiled.

    Args:
      model: the language model.
      params: its parameters, dense or packed; call `for_decoding` once if there are several calls.
      pairs: token ids of contexts, none of them empty, and of their continuations.
      batch_size: continuations in a batch; memory grows with it.

    Returns:
      An iterator over (index of the pair, likelihood), sorted by length of context.

    Raises:
      SpqrError: a context or a continuation is empty, both together exceed the model's positions plus one (the last
        token is not an input), an id is outside the vocabulary, `batch_size` is not positive, or, while iterating, a
        likelihood is not finite.

    Example:
      >>> dict(likelihoods(model, params, [([5, 6], [7]), ([5, 6], [8, 9])], batch_size=2))
      {1: Likelihood(log=-..., greedy=False), 0: Likelihood(log=-..., greedy=False)}
    """
    texts = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
    _check(model, texts, batch_size)
    params = for_decoding(model, params)
    batch_size = min(batch_size, len(texts)) or 1

    def batches() -> Iterator[tuple[int, Likelihood]]:
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i][0]), texts[i][0], -len(texts[i][1])))
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield from zip(indices, _batch(model, params, [texts[i] for i in indices], batch_size), strict=True)

    return batches()


def _batch(model: Decoder, params: Params, pairs: list[tuple[Tokens, Tokens]], batch_size: int) -> Iterator[Likelihood]:
    """Yields the likelihoods of at most `batch_size` pairs, in order."""
    contexts = {context: row for row, context in enumerate(dict.fromkeys(context for context, _ in pairs))}
    missing = _power_of_two(len(contexts)) - len(contexts)
    # A context's last token predicts the first token of each continuation, so it is an input of the second pass.
    seen, mask = pad_left([*(context[:-1] for context in contexts), *[()] * missing])
    width = _power_of_two(max(len(continuation) for _, continuation in pairs))
    rows = np.zeros(batch_size, np.int32)
    inputs, targets = np.zeros((2, batch_size, width), np.int32)
    for row, (context, continuation) in enumerate(pairs):
        rows[row] = contexts[context]
        inputs[row, : len(continuation)] = context[-1], *continuation[:-1]
        targets[row, : len(continuation)] = continuation
    logs, likeliest = map(np.asarray, _score(model, params, seen, mask, rows, inputs, targets))
    for (context, continuation), log, top in zip(pairs, logs, likeliest, strict=False):
        total = float(log[: len(continuation)].sum(dtype=np.float64))
        if not np.isfinite(total):
            where = describe_overflow(model, params, np.array([[*context, *continuation[:-1]]]))
            raise SpqrError(
                f"the log-likelihood of a continuation of {len(continuation)} tokens is {total}, because {where}"
            )
        yield Likelihood(total, bool(top[: len(continuation)].all()))


@partial(jax.jit, static_argnames="model")
def _score(
    model: Decoder,
    params: Params,
    contexts: Int[Array, "contexts seen"],
    mask: Bool[Array, "contexts seen"],
    rows: Int[Array, " batch"],
    inputs: Int[Array, "batch new"],
    targets: Int[Array, "batch new"],
) -> tuple[Float[Array, "batch new"], Bool[Array, "batch new"]]:
    """log p(target) after each input, and whether the target is the likeliest token; row i follows contexts[rows[i]].

    Padding on the right is harmless, because earlier tokens do not attend to it.
    """
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    cache = None
    if contexts.shape[1]:
        # As many slots as tokens: attention then processes the queries in parts, in less memory.
        batch, slots = contexts.shape
        empty = model.init_cache(params, batch, slots, cache_type(model))
        _, cache = apply(contexts, mask=mask, cache=empty, method="hidden_states")
        cache = _branch(cache, rows, inputs.shape[1])
    hidden, _ = apply(inputs, cache=cache, method="hidden_states")

    def score(position: tuple[Float[Array, " hidden"], Int[Array, ""]]) -> tuple[Array, Array]:
        features, target = position
        logits = apply(features, method="head").astype(jnp.float32)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, target), jnp.argmax(logits) == target

    positions = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    logs, likeliest = jax.lax.map(score, positions, batch_size=HEAD_POSITIONS)
    return logs.reshape(targets.shape), likeliest.reshape(targets.shape)


def _branch(cache: KVCache, rows: Int[Array, " batch"], new: int) -> KVCache:
    """Copies the caches of the contexts `rows`, each with `new` more slots."""

    def grow(array: Array, sequences: int, slots: int) -> Array:
        widths = [(0, 0)] * array.ndim
        widths[slots] = 0, new
        return jnp.pad(jnp.take(array, rows, axis=sequences), widths)

    def grow_block(block: State) -> State:
        return {"keys": grow(block["keys"], -4, -2), "values": grow(block["values"], -4, -1)}

    blocks = cache.blocks
    grown = grow_block(blocks) if isinstance(blocks, dict) else tuple(map(grow_block, blocks))
    return KVCache(grown, grow(cache.valid, 0, 1), cache.length)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _check(model: Decoder, pairs: list[tuple[Tokens, Tokens]], batch_size: int) -> None:
    """Raises a SpqrError that names the first pair that cannot be scored."""
    if batch_size < 1:
        raise SpqrError(f"batch_size is {batch_size}, but must be at least 1")
    most = model.config.max_positions + 1
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise SpqrError(f"the {'continuation' if context else 'context'} of pair {index} has no tokens: give one")
        if len(context) + len(continuation) > most:
            raise SpqrError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)} are more than the "
                f"{most} that a model of {model.config.max_positions} positions takes: cut the context on the left"
            )
        check_vocabulary(np.array(context + continuation), model.config.vocab_size)
