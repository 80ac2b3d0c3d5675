"""Generates text: greedy or sampled decoding of a batch of prompts with a KV cache."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from transformers import PreTrainedTokenizerBase

from pallas_kernels.backends.table import choose
from pallas_kernels.errors import SpqrError
from spqr_jax.models.decoder import Decoder, KVCache, Params
from spqr_jax.models.fusion import fuse_projections
from spqr_jax.models.overflow import describe_overflow
from spqr_jax.models.precision import cache_type
from spqr_jax.models.stacked_blocks import level_blocks, stack_blocks
from spqr_jax.models.token_ids import check_vocabulary
from spqr_jax.models.unpacked import in_rows, unpacks
from spqr_jax.prompts import Prompts, end_tokens, prompt_ids
from spqr_jax.runtime.memory import Memory
from spqr_jax.runtime.x64 import in_32_bits, steps_in_32_bits

# Lengths are rounded up to a multiple of 64, so that prompts of similar lengths share a compiled program.
_BUCKET = 64

LEAST_TEMPERATURE = 1e-6
"""Logits divided by less could pass the range of float32."""


@dataclass(frozen=True)
class Policy:
    """Choice of the next token, greedy by default, and the tokens that end a sequence."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: tuple[int, ...] = ()


@flax.struct.dataclass
class State:
    """State of decoding: the first `step` columns of `tokens` are chosen, all but the last of them are in `cache`.

    Attributes:
      stopped: sequences that have ended.
      finite: sequences whose logits were finite as long as they had not ended.
    """

    cache: KVCache
    tokens: Int[Array, "batch capacity"]
    stopped: Bool[Array, " batch"]
    finite: Bool[Array, " batch"]
    step: Int[Array, ""]
    key: Key[Array, ""]


@in_32_bits
def generate(
    model: Decoder,
    params: Params,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    With temperature 0 the next token is argmax(logits). Otherwise it is drawn from softmax(logits / temperature),
    restricted first to the `top_k` likeliest tokens and then to the fewest likeliest tokens whose probabilities
    add up to `top_p` (Holtzman et al. 2020).

    Args:
      model: the language model.
      params: its parameters, dense or packed; apply `for_decoding` once where there are many calls.
      prompts: token ids, as lists or arrays whose lengths may differ or as one array `[batch, tokens]`, or texts.
      max_new_tokens: most tokens to add to each prompt.
      temperature: 0 for greedy decoding.
      top_k: number of tokens to draw from, or None for all.
      top_p: probability in (0, 1] of the tokens to draw from, or None for all.
      seed: of the random numbers, from 0 to 2⁶⁴ − 1; the same seed gives the same tokens.
      stop_tokens: ids that end a sequence; None for `end_tokens`, all that end the model's texts.
      tokenizer: makes token ids of texts, with the special tokens that it puts around them; needed for texts only.

    Returns:
      The new tokens of each prompt, up to its first stop token, without it.

    Raises:
      SpqrError: an argument is out of its range, a prompt is empty, has an id outside the vocabulary, or is a text
        without a tokenizer, a prompt and its new tokens exceed the positions of the model, or logits are not finite,
        with the block where they became so.

    Example:
      >>> [len(tokens) for tokens in generate(model, params, [[84, 104], [28]], max_new_tokens=3)]
      [3, 3]
      >>> [len(tokens) for tokens in generate(model, params, "The sky", max_new_tokens=3, tokenizer=tokenizer)]
      [3]
    """
    chunks = stream(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=stop_tokens,
        tokenizer=tokenizer,
        chunk=max_new_tokens,
    )
    return next(chunks)


@steps_in_32_bits
def stream(
    model: Decoder,
    params: Params,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk: int = 1,
) -> Iterator[list[list[int]]]:
    """Yields the tokens of `generate` as soon as they are computed, `chunk` at a time.

    Args:
      chunk: tokens per prompt between two yields; the other arguments are those of `generate`.

    Returns:
      An iterator over lists of the next tokens of each prompt, empty for one that has stopped.

    Raises:
      SpqrError: as `generate`, when called; that logits are not finite, while iterating.

    Example:
      >>> [len(tokens) for (tokens,) in stream(model, params, [[84, 104]], max_new_tokens=5, chunk=2)]
      [2, 2, 1]
    """
    ends = end_tokens(model, tokenizer) if stop_tokens is None else tuple(stop_tokens)
    policy = Policy(temperature, top_k, top_p, ends)
    ids = prompt_ids(prompts, tokenizer)
    _check(model, ids, max_new_tokens, policy)
    if not 0 <= seed < 2**64:
        raise SpqrError(f"seed is {seed}, but must be at least 0 and below 2^64")
    if chunk < 1:
        raise SpqrError(f"chunk is {chunk}, but must be at least 1")
    params = for_decoding(model, params)
    state, tokens, mask = start(model, params, ids, max_new_tokens, seed)

    def chunks(state: State) -> Iterator[list[list[int]]]:
        state = extend(model, policy, params, state, tokens, mask)
        for begin in range(0, max_new_tokens, chunk):
            limit = min(begin + chunk, max_new_tokens)
            if limit > 1:
                state = decode(model, policy, params, state, limit)
            rows = np.asarray(state.tokens)[:, :limit].tolist()
            _check_finite(model, params, ids, rows, np.asarray(state.finite))
            yield [_until_stop(row, policy.stop_tokens)[begin:] for row in rows]
            if state.stopped.all():
                return

    return chunks(state)


@in_32_bits
def for_decoding(model: Decoder, params: Params, memory: Memory | str = Memory.AUTO) -> Params:
    """Puts parameters on the device in the form with the shortest latency per token.

    For the kernels of a GPU every block has arrays of its own (`level_blocks`). Elsewhere blocks are stacked, which
    compiles as fast as one block. On a CPU the matrices are unpacked once, to 16 bits (`unpacked.in_rows`). Where they
    stay packed, those of one input are fused (`fuse_projections`).

    Args:
      model: the language model.
      params: its parameters; those in such a form already are returned unchanged.
      memory: on a CPU, `unpacked` or `packed`; `auto` unpacks where the weights fit into the available memory.

    Raises:
      SpqrError: `memory` is none of these.
    """
    if choose(None).kernels:
        return jax.device_put(level_blocks(fuse_projections(params, model)))
    if unpacks(params, memory, bytes_per_weight=2):
        return in_rows(params, model)
    return jax.device_put(stack_blocks(fuse_projections(params, model)))


@in_32_bits
def start(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int = 0,
    platform: str | None = None,
) -> tuple[State, Int[np.ndarray, "batch tokens"], Bool[np.ndarray, "batch tokens"]]:
    """Prepares the first new token: the arguments of `extend`, which are the state and the prompts, padded on the left.

    Args:
      params: in the form of `for_decoding`; the cache has its structure.
      platform: of the device that will decode, see `cache_type`; None for JAX's default device.

    Example:
      >>> params = for_decoding(model, params)
      >>> state, tokens, mask = start(model, params, [[84, 104]], max_new_tokens=4)
      >>> state = extend(model, Policy(), params, state, tokens, mask)  # the first new token
      >>> state = decode(model, Policy(), params, state, 4)  # the others
      >>> int(state.step)
      4
    """
    tokens, mask = pad_left(prompts)
    batch, length = tokens.shape
    capacity = _round_up(max_new_tokens)
    state = State(
        cache=model.init_cache(params, batch, length + capacity, cache_type(model, platform)),
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        stopped=jnp.zeros(batch, bool),
        finite=jnp.ones(batch, bool),
        step=jnp.zeros((), jnp.int32),
        key=_key(seed),
    )
    return state, tokens, mask


def _key(seed: int) -> Key[Array, ""]:
    """The key of a seed of 64 bits; `jax.random.key` takes 32, or 64 with `JAX_ENABLE_X64`."""
    key = jax.random.key(np.uint32(seed & 0xFFFFFFFF))
    return jax.random.fold_in(key, np.uint32(seed >> 32)) if seed >> 32 else key


@partial(jax.jit, static_argnames=("model", "policy"), donate_argnames="state")
def extend(
    model: Decoder,
    policy: Policy,
    params: Params,
    state: State,
    tokens: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens"],
) -> State:
    """Runs the model over tokens that are not in the cache yet, and chooses the next one from the last logits.

    The state is donated, here and in `decode`: the cache is written in place.
    """
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    hidden, cache = apply(tokens, mask=mask, cache=state.cache, method="hidden_states")
    logits = apply(hidden[:, -1], method="head").astype(jnp.float32)
    key, subkey = jax.random.split(state.key)
    chosen = _choose(logits, policy, subkey)
    return State(
        cache=cache,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.step, axis=1),
        finite=state.finite & (state.stopped | jnp.isfinite(logits).all(axis=-1)),
        stopped=state.stopped | jnp.isin(chosen, jnp.asarray(policy.stop_tokens, jnp.int32)),
        step=state.step + 1,
        key=key,
    )


@partial(jax.jit, static_argnames=("model", "policy"), donate_argnames="state")
def decode(model: Decoder, policy: Policy, params: Params, state: State, limit: Int[Array, ""] | int) -> State:
    """Adds tokens until there are `limit` of them or every sequence has stopped."""

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.step < limit) & ~state.stopped.all()

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        return extend(model, policy, params, state, last, jnp.ones(last.shape, bool))

    return jax.lax.while_loop(unfinished, step, state)


def _choose(logits: Float[Array, "batch vocabulary"], policy: Policy, key: Key[Array, ""]) -> Int[Array, " batch"]:
    if policy.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / policy.temperature
    if policy.top_k is None and policy.top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    vocab_size = logits.shape[-1]
    logits, ids = jax.lax.top_k(logits, min(policy.top_k or vocab_size, vocab_size))
    if policy.top_p is not None:
        probabilities = jax.nn.softmax(logits)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(likelier < policy.top_p, logits, -jnp.inf)
    rank = jax.random.categorical(key, logits)
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def pad_left(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "batch tokens"], Bool[np.ndarray, "batch tokens"]]:
    """Pads prompts on the left to one of few lengths; returns the array and the mask of their tokens."""
    length = _round_up(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _until_stop(tokens: list[int], stop_tokens: tuple[int, ...]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[:end]


def _check_finite(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    rows: list[list[int]],
    finite: Bool[np.ndarray, " batch"],
) -> None:
    """Raises a SpqrError that names the first sequence whose logits were not finite, and where they became so."""
    for index in np.flatnonzero(~finite).tolist():
        where = describe_overflow(model, params, np.array([[*prompts[index], *rows[index][:-1]]]))
        raise SpqrError(f"the next token after prompt {index} cannot be chosen, because {where}")


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, policy: Policy) -> None:
    if max_new_tokens < 1:
        raise SpqrError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    if policy.temperature != 0 and not LEAST_TEMPERATURE <= policy.temperature < math.inf:
        raise SpqrError(f"temperature is {policy.temperature}, but must be 0 or a number from {LEAST_TEMPERATURE:g} on")
    if policy.top_k is not None and policy.top_k < 1:
        raise SpqrError(f"top_k is {policy.top_k}, but must be at least 1")
    if policy.top_p is not None and not 0 < policy.top_p <= 1:
        raise SpqrError(f"top_p is {policy.top_p}, but must be over 0 and at most 1")
    if not prompts:
        raise SpqrError("there are no prompts")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise SpqrError(f"prompt {index} is empty")
        check_vocabulary(prompt, model.config.vocab_size)
    longest, positions = max(map(len, prompts)), model.config.max_positions
    if longest + max_new_tokens > positions:
        raise SpqrError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {positions} positions of the model"
        )
