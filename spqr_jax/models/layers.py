"""The parts that decoder families share: linear layers, norms, rotary embedding, attention, the KV cache."""

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import SplitTensor, SpqrTensor, split_matmul, spqr_matmul
from spqr_jax.models.row_major import RowMajor, row_major_product

QUERY_CHUNK = 256
"""Queries whose scores are held at once in a forward pass without a KV cache."""


Kernel = Float[Array | np.ndarray, "in out"] | RowMajor | SpqrTensor | SplitTensor
"""A weight: dense, unpacked for a CPU, packed, or packed and split over devices."""


def linear(
    x: Float[Array, "*batch in"],
    kernel: Kernel,
    bias: Float[Array | np.ndarray, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """y = x Wᵀ + b; `kernel` is a dense `[in, out]` array, or another type of `Kernel`, of shape `(out, in)`.

    This is the only function of a model that knows packed weights.
    """
    if isinstance(kernel, SplitTensor):
        y = split_matmul(x, kernel)
    elif isinstance(kernel, SpqrTensor):
        y = spqr_matmul(x, kernel)
    elif isinstance(kernel, RowMajor):
        y = row_major_product(x, kernel)
    else:
        y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def mesh_of(params: object) -> Mesh | None:
    """The mesh over which matrices of a parameter tree are split; None where none is."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SplitTensor))
    return next((leaf.mesh for leaf in leaves if isinstance(leaf, SplitTensor)), None)


class Linear(nn.Module):
    """`linear` with the module's own `kernel` and, if it has one, `bias`."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        kernel: Kernel
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return linear(x, kernel, bias)


class RMSNorm(nn.Module):
    """x · scale / sqrt(mean(x²) + epsilon), the mean taken in float32 (Zhang and Sennrich 2019)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return normal.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean(x)) · scale / sqrt(var(x) + epsilon) + bias, all in float32 (Ba et al. 2016)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@dataclass(frozen=True)
class RotaryConfig:
    """Angles from positions (Su et al. 2021), with the two scalings that LLaMA checkpoints use.

    Attributes:
      theta: base of the geometric series of frequencies.
      scaling: `default`, `linear` (positions divided by `factor`) or `llama3` (only long wavelengths divided,
        with a ramp between `original_context / low_freq_factor` and `original_context / high_freq_factor`).
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def frequencies(self, head_dim: int) -> Float[Array, " half"]:
        """Radians per position of each pair of features, `[head_dim / 2]`."""
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / (self.theta**exponents)
        if self.scaling == "default":
            return frequencies
        if self.scaling == "linear":
            return frequencies / self.factor
        turns = self.original_context * frequencies / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = jnp.clip(ramp, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    positions: Int[Array, "batch tokens"],
    rotary: RotaryConfig,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotates the pair (x[i], x[i + head_dim / 2]) by position · frequency[i], in float32."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary.frequencies(x.shape[-1])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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

    Both are stored in the order in which attention sums them, so that it needs no copy: the features of a key are
    contiguous, and so are all slots of a feature of the values.

    Returns:
      The state with the new cache, and the keys `[batch, kv_heads, slots, head_dim]` and the values
      `[batch, kv_heads, head_dim, slots]` of all slots. A state without a cache does not change, and the tokens are the
      slots.
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
    return {**state, "keys": all_keys, "values": all_values}, all_keys[layer], all_values[layer]


def attend(
    queries: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads head_dim slots"],
    mask: Bool[Array, "batch tokens slots"],
    bias: Float[Array, "batch heads slots"] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """softmax(Q Kᵀ / sqrt(head_dim) + bias) V where `mask`; each KV head serves heads / kv_heads query heads.

    The mask must be causal: where slots are tokens, later ones are not read. A row whose mask is empty (padding) gives
    the mean of the values that it reads, never a NaN.

    The devices of a mesh share the KV heads, or all compute all of them where they do not divide.
    """
    if mesh is None:
        return _attend_chunks(queries, keys, values, mask, bias)
    # Without this, XLA gathers the cache: it cannot split heads over devices once they are one axis with sequences.
    axis = mesh.axis_names[0] if keys.shape[1] % mesh.size == 0 else None
    heads_second, heads_third = P(None, axis), P(None, None, axis)
    specs = heads_third, heads_second, heads_second, P(), heads_second
    over = jax.shard_map(_attend_chunks, mesh=mesh, in_specs=specs, out_specs=heads_third)
    return over(queries, keys, values, mask, bias)


def _attend_chunks(queries: Array, keys: Array, values: Array, mask: Array, bias: Array | None) -> Array:
    tokens, slots = queries.shape[1], keys.shape[2]
    if tokens != slots:
        return _attend_all(queries, keys, values, mask, bias)
    parts = []
    for start in range(0, tokens, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, tokens)
        chunk = slice(start, stop)
        seen = None if bias is None else bias[..., :stop]
        parts.append(_attend_all(queries[:, chunk], keys[:, :, :stop], values[..., :stop], mask[:, chunk, :stop], seen))
    return jnp.concatenate(parts, axis=1)


def _attend_all(queries: Array, keys: Array, values: Array, mask: Array, bias: Array | None) -> Array:
    batch, tokens, heads, head_dim = queries.shape
    _, kv_heads, slots, _ = keys.shape
    # The query heads of one KV head are rows of one matrix, so each KV head is one product. Sequences and heads are one
    # axis: with two, XLA would transpose the cache for each token.
    rows = (queries / math.sqrt(head_dim)).reshape(batch, tokens, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * kv_heads, -1, head_dim)
    keys = keys.reshape(batch * kv_heads, slots, head_dim)
    values = values.reshape(batch * kv_heads, head_dim, slots)
    scores = jnp.einsum("nrd,nsd->nrs", rows, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, tokens, slots)
    if bias is not None:
        scores = scores + bias.reshape(batch, kv_heads, -1, 1, slots)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    weights = weights.reshape(*rows.shape[:2], slots)
    attended = jnp.einsum("nrs,nds->nrd", weights, values, preferred_element_type=jnp.float32).astype(queries.dtype)
    return attended.reshape(batch, heads, tokens, head_dim).transpose(0, 2, 1, 3)
