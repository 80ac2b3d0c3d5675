"""Measured decoding with packed and with bfloat16 weights on JAX's device, in the paper's two set-ups.

A step is one iteration of `generation.decode`, the loop that `generate` runs. Products and attention are also timed in
separate programs of equal shapes. The remainder of the step is reported as the rest.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.aot import Format
from pallas_kernels.benchmark.timing import Timing, seconds_per_call, summary
from pallas_kernels.format.tensor import SpqrTensor
from spqr_jax import generation
from spqr_jax.benchmark.random_model import fused_shapes, random_params
from spqr_jax.benchmark.results import Row
from spqr_jax.generation import Policy
from spqr_jax.models import Decoder, layer_name
from spqr_jax.models.attention import attend
from spqr_jax.models.decoder import Params
from spqr_jax.models.layers import linear
from spqr_jax.models.precision import cache_type

T = TypeVar("T")

NEW_TOKENS = 100
BATCHES, PREFIXES = (1, 16), (0, 1024)
REPETITIONS = 5
ROOM = 1.15
"""Approximate memory of decoding / memory of the weights and the cache."""


def measured_rows(
    model: Decoder,
    forms: Sequence[Format | None],
    *,
    batches: Sequence[int] = BATCHES,
    prefixes: Sequence[int] = PREFIXES,
    deadline: float = float("inf"),
) -> Iterator[Row]:
    """Measures and yields rows by batch, format and prefix, until the deadline.

    Args:
      model: the model, which gets random weights.
      forms: formats of the packed matrices. None: bfloat16.
      batches: numbers of sequences.
      prefixes: lengths of the prompts. 0 stands for a prompt of one token, the shortest possible.
      deadline: time of `time.monotonic` after which no new measurement starts.
    """
    for batch in batches:
        for form in forms:
            if time.monotonic() > deadline:
                return
            rows = [empty_row(model, form, batch, prefix) for prefix in prefixes]
            yield from (row for row in rows if row.skipped)
            rows = [row for row in rows if not row.skipped]
            if not rows:
                continue
            params = random_params(model, form)
            products = products_seconds(model, params, batch)
            ready = generation.for_decoding(model, params)
            for row in rows:
                if time.monotonic() < deadline:
                    yield _measured(model, ready, row, products)


def empty_row(model: Decoder, form: Format | None, batch: int, prefix: int, platform: str | None = None) -> Row:
    """A row without times. It is marked as skipped if the device has too little memory.

    Args:
      model: the model.
      form: format of the packed matrices; None for a dense model.
      batch: number of sequences.
      prefix: length of the prompts.
      platform: of the device that the row is for; None for JAX's default device.

    Example:
      >>> from spqr_jax.benchmark.random_model import MODELS
      >>> empty_row(MODELS["tiny"], None, batch=2, prefix=0).cache_bytes
      393216
    """
    params = jax.eval_shape(lambda: random_params(model, form))
    state = jax.eval_shape(lambda: start(model, params, batch, prefix, platform)[0])
    weight_bytes, cache_bytes = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (params, state.cache.blocks)
    )
    row = Row("bfloat16" if form is None else str(form), batch, prefix, weight_bytes, cache_bytes)
    limit = memory_limit()
    if ROOM * (weight_bytes + cache_bytes) < limit:
        return row
    needed = f"{weight_bytes / 1e9:.1f} GB of weights and {cache_bytes / 1e9:.1f} GB of cache"
    return replace(row, skipped=f"{needed} do not fit into {limit / 1e9:.1f} GB")


def memory_limit() -> float:
    """Bytes of device memory that JAX may allocate. Infinity if the device does not report a limit."""
    return float((jax.devices()[0].memory_stats() or {}).get("bytes_limit", "inf"))


def start(
    model: Decoder, params: Params, batch: int, prefix: int, platform: str | None = None
) -> tuple[generation.State, Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
    """Starts generation from random prompts of one length: the state, the prompt tokens, and their mask."""
    size = batch, max(prefix, 1)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, size).tolist()
    return generation.start(model, params, prompts, NEW_TOKENS, platform=platform)


def products_seconds(model: Decoder, params: Params, batch: int) -> float:
    """Seconds of all products with matrices in one step, each timed alone with its matrix not in the cache."""

    def seconds(kernel: SpqrTensor | Float[Array, "in out"], in_features: int) -> float:
        x = jax.random.normal(jax.random.key(0), (batch, 1, in_features), model.dtype)
        return seconds_per_call(linear, x, kernel).seconds

    block = params[layer_name(0)]
    of_block = sum(seconds(block[name]["kernel"], shape[1]) for name, shape in fused_shapes(model).items())
    return model.config.num_layers * of_block + seconds(params["lm_head"]["kernel"], model.config.hidden_size)


def attention_seconds(model: Decoder, batch: int, slots: int) -> float:
    """Seconds of the attention of all blocks over the cache in one step."""
    config = model.config
    queries = jnp.ones((batch, 1, config.num_heads, config.head_dim), model.dtype)
    keys = jnp.zeros((batch, config.num_kv_heads, slots, config.head_dim), cache_type(model))
    cache = {"keys": keys, "values": keys.swapaxes(2, 3)}
    mask = jnp.ones((batch, 1, slots), bool)
    one = seconds_per_call(lambda x, cache: attend(x, cache["keys"], cache["values"], mask), queries, cache)
    return config.num_layers * one.seconds


def _measured(model: Decoder, params: Params, row: Row, products: float) -> Row:
    try:
        first, step, slots = step_seconds(model, params, row.batch, row.prefix)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return replace(row, skipped="the device ran out of memory")
    attention = attention_seconds(model, row.batch, slots)
    return row.with_times(
        step.seconds, products, attention, step_quartiles=step.quartiles, first_token_seconds=first.seconds
    )


def step_seconds(model: Decoder, params: Params, batch: int, prefix: int) -> tuple[Timing, Timing, int]:
    """The time to the first token, the time of a later step, and the number of slots in the cache."""
    firsts, steps, slots = [], [], 0
    # The first repetition compiles and is not counted.
    for repetition in range(REPETITIONS + 1):
        state, tokens, mask = jax.block_until_ready(start(model, params, batch, prefix))
        slots = state.cache.valid.shape[1]
        state, first = _timed(lambda: generation.extend(model, Policy(), params, state, tokens, mask))  # noqa: B023
        _, others = _timed(lambda: generation.decode(model, Policy(), params, state, NEW_TOKENS))  # noqa: B023
        if repetition:
            firsts.append(first)
            steps.append(others / (NEW_TOKENS - 1))
    return summary(firsts), summary(steps), slots


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - started
