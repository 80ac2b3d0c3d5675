"""Attention of a block: rotated queries and keys, the KV cache, causal masks with windows, and the softmax."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from spqr_jax.models.rotary import RotaryConfig

QUERY_CHUNK = 256
"""Queries whose scores are held at once in a forward pass without a KV cache."""

FEWEST_SLOTS = 64
"""Fewest slots of a cache that attention is compiled for; see `over_filled`."""

NO_WINDOW = 2**30
"""A window that holds every text."""


@dataclass(frozen=True)
class AttentionKind:
    """How a block attends; the blocks of a model can be of several kinds.

    Attributes:
      rotary: rotation of queries and keys; None for none.
      window: last tokens that a token attends to, itself included; None for all.
    """

    rotary: RotaryConfig | None
    window: int | None = None


def rotation(
    kinds: Sequence[AttentionKind],
    kind: Int[Array, ""] | int,
    head_dim: int,
    length: Int[Array, ""],
) -> tuple[Float[Array, " half"], Float[Array, ""] | float] | None:
    """Frequencies and factor of the rotation of one of several kinds of attention; None if no kind has any.

    Frequencies of 0 rotate nothing, so that one program serves blocks with and without a rotation.
    """
    rotaries = [rotary for one in kinds if (rotary := one.rotary) is not None]
    if not rotaries:
        return None
    tables = [None if one.rotary is None else one.rotary.frequencies(head_dim, length) for one in kinds]
    features = max(len(table) for table in tables if table is not None)
    frequencies = [jnp.zeros(features) if table is None else table for table in tables]
    factors = [1.0 if one.rotary is None else one.rotary.attention_factor for one in kinds]
    if isinstance(kind, int):
        return frequencies[kind], factors[kind]
    factor = factors[0] if len(set(factors)) == 1 else jnp.array(factors)[kind]
    return jnp.stack(frequencies)[kind], factor


def in_window(
    mask: Bool[Array, "batch tokens slots"],
    kinds: Sequence[AttentionKind],
    kind: Int[Array, ""] | int,
    offset: Int[Array, ""],
) -> Bool[Array, "batch tokens slots"]:
    """The part of a mask in the window of one of several kinds of attention, with `offset` the first token's slot."""
    widths = [NO_WINDOW if one.window is None else one.window for one in kinds]
    if set(widths) == {NO_WINDOW} or (isinstance(kind, int) and widths[kind] == NO_WINDOW):
        return mask
    width = widths[kind] if isinstance(kind, int) else jnp.array(widths)[kind]
    tokens, slots = mask.shape[1:]
    return mask & (jnp.arange(slots) > (offset + jnp.arange(tokens))[:, None] - width)


def extend_cache(
    state: dict[str, Array],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    offset: Int[Array, ""],
    layer: Int[Array, ""] | None = None,
) -> tuple[dict[str, Array], Array, Array]:
    """Writes new keys and values into the cache in a state, `keys` and `values`, from slot `offset` on.

    With `layer`, the arrays are those of all blocks, stacked. Only the new slots are written, so that a loop over the
    blocks does not copy the cache.

    Both are stored in the order in which a GPU's attention sums them, so that it needs no copy: the features of a key
    are contiguous, and so are all slots of a feature of the values.

    Returns:
      The state with the new cache, and the keys `[batch, kv_heads, slots, head_dim]` and the values
      `[batch, kv_heads, head_dim, slots]` of all slots, stacked with `layer`; see `first_slots`. A state without a
      cache does not change, and the tokens are the slots.
    """
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 3, 1)
    if "keys" not in state:
        return state, keys, values
    keys, values = keys.astype(state["keys"].dtype), values.astype(state["values"].dtype)
    zero = jnp.int32(0)  # of the offset's type, with `JAX_ENABLE_X64` too
    if layer is None:
        keys = jax.lax.dynamic_update_slice(state["keys"], keys, (zero, zero, offset, zero))
        values = jax.lax.dynamic_update_slice(state["values"], values, (zero, zero, zero, offset))
        return {**state, "keys": keys, "values": values}, keys, values
    layer = layer.astype(jnp.int32)
    all_keys = jax.lax.dynamic_update_slice(state["keys"], keys[None], (layer, zero, zero, offset, zero))
    all_values = jax.lax.dynamic_update_slice(state["values"], values[None], (layer, zero, zero, zero, offset))
    return {**state, "keys": all_keys, "values": all_values}, all_keys, all_values


def first_slots(
    keys: Float[Array, "*blocks batch kv_heads slots head_dim"],
    values: Float[Array, "*blocks batch kv_heads head_dim slots"],
    layer: Int[Array, ""] | None,
    count: int,
) -> tuple[Float[Array, "batch kv_heads {count} head_dim"], Float[Array, "batch kv_heads head_dim {count}"]]:
    """The first `count` slots of a block, from its own keys and values or from those of all blocks, stacked."""
    if layer is None or keys.ndim == 4:
        return keys[:, :, :count], values[..., :count]
    starts = (layer.astype(jnp.int32), *[jnp.int32(0)] * 4)
    of_keys, of_values = (1, *keys.shape[1:3], count, keys.shape[4]), (1, *values.shape[1:4], count)
    return jax.lax.dynamic_slice(keys, starts, of_keys)[0], jax.lax.dynamic_slice(values, starts, of_values)[0]


def over_filled(attended: Callable[[int], Array], slots: int, filled: Int[Array, ""]) -> Array:
    """`attended(n)` over the first n slots, which hold the `filled` ones: n is a power of two, or all of them.

    On a CPU a step then takes the time of the tokens so far, not of the longest text that the cache could hold. On a
    GPU the choice would take longer than the slots.
    """
    counts = [FEWEST_SLOTS << power for power in range(slots.bit_length()) if FEWEST_SLOTS << power < slots]
    choices = [partial(attended, count) for count in (*counts, slots)]
    if not counts:
        return attended(slots)
    index = jnp.searchsorted(jnp.array(counts), filled)
    return jax.lax.platform_dependent(cpu=lambda: jax.lax.switch(index, choices), default=choices[-1])


def attend(
    queries: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads head_dim slots"],
    mask: Bool[Array, "batch tokens slots"],
    bias: Float[Array, "batch heads slots"] | None = None,
    mesh: Mesh | None = None,
    divisor: float | None = None,
    cap: float | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """softmax(s(Q Kᵀ / divisor) + bias) V where `mask`; each KV head serves heads / kv_heads query heads.

    The divisor is sqrt(head_dim) unless given. s(x) is cap · tanh(x / cap), or x without a cap.

    The mask must be causal: where slots are tokens, later ones are not read. A row whose mask is empty (padding) gives
    the mean of the values that it reads, never a NaN.

    The devices of a mesh share the KV heads, or all compute all of them where they do not divide.
    """
    chunks = partial(_attend_chunks, divisor=divisor or math.sqrt(queries.shape[-1]), cap=cap)
    if mesh is None:
        return chunks(queries, keys, values, mask, bias)
    # Without this, XLA gathers the cache: it cannot split heads over devices once they are one axis with sequences.
    axis = mesh.axis_names[0] if keys.shape[1] % mesh.size == 0 else None
    heads_second, heads_third = P(None, axis), P(None, None, axis)
    specs = heads_third, heads_second, heads_second, P(), heads_second
    over = jax.shard_map(chunks, mesh=mesh, in_specs=specs, out_specs=heads_third)
    return over(queries, keys, values, mask, bias)


def _attend_chunks(
    queries: Array, keys: Array, values: Array, mask: Array, bias: Array | None, *, divisor: float, cap: float | None
) -> Array:
    tokens, slots = queries.shape[1], keys.shape[2]
    attend_all = partial(_attend_all, divisor=divisor, cap=cap)
    if tokens != slots:
        return attend_all(queries, keys, values, mask, bias)
    parts = []
    for start in range(0, tokens, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, tokens)
        chunk = slice(start, stop)
        seen = None if bias is None else bias[..., :stop]
        parts.append(attend_all(queries[:, chunk], keys[:, :, :stop], values[..., :stop], mask[:, chunk, :stop], seen))
    return jnp.concatenate(parts, axis=1)


def _attend_all(
    queries: Array, keys: Array, values: Array, mask: Array, bias: Array | None, *, divisor: float, cap: float | None
) -> Array:
    batch, tokens, heads, head_dim = queries.shape
    _, kv_heads, slots, _ = keys.shape
    # The query heads of one KV head are rows of one matrix, so each KV head is one product. Sequences and heads are one
    # axis: with two, XLA would transpose the cache for each token.
    rows = (queries / divisor).reshape(batch, tokens, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * kv_heads, -1, head_dim)
    keys = keys.reshape(batch * kv_heads, slots, head_dim)
    values = values.reshape(batch * kv_heads, head_dim, slots)
    scores = jnp.einsum("nrd,nsd->nrs", rows, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, tokens, slots)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias.reshape(batch, kv_heads, -1, 1, slots)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    weights = weights.reshape(*rows.shape[:2], slots)
    attended = jnp.einsum("nrs,nds->nrd", weights, values, preferred_element_type=jnp.float32).astype(queries.dtype)
    return attended.reshape(batch, heads, tokens, head_dim).transpose(0, 2, 1, 3)
