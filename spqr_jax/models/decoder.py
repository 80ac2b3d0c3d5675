"""The parts that every decoder-only family shares: embedding, a stack of blocks, a final norm and a head.

A family adds one file: its configuration, and a block cut into *stages*. A stage ends where the next matrices
have their input, so quantization can stop there, solve those matrices and resume with the quantized ones. That
takes one forward pass per block, and each matrix is quantized for the inputs that it will see.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Integer, Num

from spqr_jax.models.attention import (
    AttentionKind,
    attend,
    extend_cache,
    first_slots,
    in_window,
    over_filled,
    rotation,
)
from spqr_jax.models.block_kinds import BlockKinds
from spqr_jax.models.embedding import Embedding, look_up, tied_logits
from spqr_jax.models.experts import experts_linear, matrix_names
from spqr_jax.models.generation_options import GenerationOptions
from spqr_jax.models.layers import Linear, linear, mesh_of
from spqr_jax.models.model_config import ModelConfig
from spqr_jax.models.rotary import rotate

Params = dict[str, Any]
State = dict[str, Num[Array, "..."]]
"""Arrays `[batch, tokens, …]` of a block, and its part of the KV cache."""


@dataclass(frozen=True)
class Stage:
    """One part of a block.

    Attributes:
      method: name of the block's method, `(state, context) -> state`.
      feeds: for each entry of the new state that matrices multiply next, the names of those matrices. One stage only
        writes an entry, and the next stage removes it, by `Block.project`.
      restores: the entry whose one matrix can correct the error that quantization has left in `hidden`, because the
        next stage adds its product there. If several products are added, name one; otherwise each would correct the
        same error. None where the product is not added as it is, as behind a norm.
      multiplier: factor of that product when it is added.
      routed_by: the entry that names the experts of each token, where the matrices are stacks of those of all experts,
        see `experts`; else None.
    """

    method: str
    feeds: Mapping[str, tuple[str, ...]]
    restores: str | None = None
    multiplier: float = 1.0
    routed_by: str | None = None


@flax.struct.dataclass
class Context:
    """The part of the input that all blocks of a forward pass share.

    Attributes:
      positions: place of each token in its sequence, padding not counted.
      mask: True at the slots that a token may attend to; without a KV cache the slots are the tokens.
      slot_positions: place in its sequence of the token in each slot; 0 or less in an empty slot.
      offset: first slot to be written in the KV cache.
      layer: number of the block, where the KV caches of all blocks are stacked; else None.
      mesh: devices over which matrices are split; None where they are not.
    """

    positions: Int[Array, "batch tokens"]
    mask: Bool[Array, "batch tokens slots"]
    slot_positions: Int[Array, "batch slots"]
    offset: Int[Array, ""]
    layer: Int[Array, ""] | None = None
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in arrays of fixed length.

    Attributes:
      blocks: for each block its `keys`, `[batch, kv_heads, slots, head_dim]`, and `values`,
        `[batch, kv_heads, head_dim, slots]`; stacked where the parameters are.
      valid: True at the slots that hold a real token (neither padding nor still empty).
      length: number of slots written; the next tokens go there.
    """

    blocks: tuple[State, ...] | State
    valid: Bool[Array, "batch slots"]
    length: Int[Array, ""]


class Block(nn.Module):
    """A decoder block as a chain of stages over a state, which starts and ends as `{"hidden": x}`.

    Attributes:
      config: sizes and options of the model.
      index: number of the block, which decides its kind of attention; not read where blocks are stacked.
    """

    config: ModelConfig
    index: int = 0
    by_columns: ClassVar[tuple[str, ...]]
    """Names of the matrices that `shard_params` splits by columns; it splits the others by rows."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The parts of the block in order; they may depend on its configuration."""
        raise NotImplementedError

    def __call__(self, state: State, context: Context) -> State:
        for stage in self.stages:
            state = getattr(self, stage.method)(state, context)
        return state

    def feeds(self) -> dict[str, tuple[str, ...]]:
        """The entries of the state that matrices multiply, each with the names of its matrices, in order of use."""
        return {feed: names for stage in self.stages for feed, names in stage.feeds.items()}

    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices that are quantized, or of stacks of them, in the order in which they are used."""
        return tuple(name for names in self.feeds().values() for name in names)

    def experts(self) -> Mapping[str, int]:
        """For each name of `matrices` that stands for a stack, the number of experts."""
        return {}

    def single_matrices(self) -> tuple[str, ...]:
        """Names of all matrices, see `experts.matrix_names`, in the order of `matrices`."""
        return tuple(name for layer in self.matrices() for name in matrix_names(layer, self.experts().get(layer)))

    def heads(self) -> dict[str, int]:
        """For each matrix whose rows are those of heads, their number; `shard_params` splits no head."""
        raise NotImplementedError

    def project(self, state: State) -> tuple[State, State]:
        """Multiplies every entry of a state that feeds matrices by each of them.

        Matrices of one input that `fuse_projections` has fused take one product.

        Returns:
          The state without those entries, and the products under the names of the matrices.
        """
        state = dict(state)
        products: State = {}
        for stage in self.stages:
            for feed, names in stage.feeds.items():
                if feed in state:
                    chosen = () if stage.routed_by is None else (state[stage.routed_by],)
                    products |= dict(zip(names, self._products(state.pop(feed), names, *chosen), strict=True))
        return state, products

    def attend(
        self,
        state: State,
        queries: Float[Array, "batch tokens heads head_dim"],
        keys: Float[Array, "batch tokens kv_heads head_dim"],
        values: Float[Array, "batch tokens kv_heads head_dim"],
        context: Context,
        *,
        bias: Float[Array, "batch heads slots"] | None = None,
        divisor: float | None = None,
        cap: float | None = None,
    ) -> State:
        """Adds `attention_output` to a state: `attention.attend` of rotated queries and keys, in the block's window.

        Where one more token changes the rotation of those before it, the cache holds keys that are not rotated yet.
        """
        kinds = tuple(dict.fromkeys(map(self.config.attention, range(self.config.num_layers))))
        kind = self._kind(kinds, context)
        turn = rotation(kinds, kind, self.config.head_dim, context.positions.max() + 1)
        late = any(one.rotary is not None and one.rotary.depends_on_length for one in kinds)
        if turn is not None:
            queries = rotate(queries, context.positions, *turn)
        if turn is not None and not late:
            keys = rotate(keys, context.positions, *turn)
        state, keys, values = extend_cache(state, keys, values, context.offset, context.layer)
        mask, slots = in_window(context.mask, kinds, kind, context.offset), keys.shape[-2]

        def over(count: int) -> Array:
            own_keys, own_values = first_slots(keys, values, context.layer, count)
            if turn is not None and late:
                by_slots = own_keys.swapaxes(1, 2)
                own_keys = rotate(by_slots, context.slot_positions[:, :count], *turn).swapaxes(1, 2)
            seen = None if bias is None else bias[..., :count]
            return attend(queries, own_keys, own_values, mask[..., :count], seen, context.mesh, divisor, cap)

        one_by_one = queries.shape[1] == 1 and keys.ndim == 5
        attended = over_filled(over, slots, context.offset + 1) if one_by_one else over(slots)
        return {**state, "attention_output": attended.reshape(*attended.shape[:2], -1)}

    def _kind(self, kinds: tuple[AttentionKind, ...], context: Context) -> Int[Array, ""] | int:
        """Index of the block's kind of attention; traced where blocks are stacked."""
        if context.layer is None or len(kinds) == 1:
            return kinds.index(self.config.attention(self.index))
        of_blocks = [kinds.index(self.config.attention(index)) for index in range(self.config.num_layers)]
        return jnp.array(of_blocks)[context.layer]

    def _products(self, x: Array, names: tuple[str, ...], *chosen: Int[Array, "*batch count"]) -> list[Array]:
        """The products of x with matrices, or with those of the experts that are chosen."""
        layers = [getattr(self, name) for name in names]
        fused: Params | None = self.get_variable("params", fused_name(names)) if len(names) > 1 else None
        if fused is None:
            return [layer(x, *chosen) for layer in layers]
        product = experts_linear(x, fused["kernel"], *chosen) if chosen else linear(x, **fused)
        return jnp.split(product, np.cumsum([layer.features for layer in layers])[:-1], axis=-1)


class Decoder(nn.Module):
    """A causal language model; a family sets `block` and `norm_module`.

    `params` holds `embed_tokens`, `layers_0` … `layers_{n-1}`, `norm` and, unless the embedding is tied, `lm_head`.
    `stack_blocks(params)` turns the layers into one tree with a leading axis, `blocks`, over which the forward pass
    scans: it then compiles as fast as one block.

    Attributes:
      config: sizes and options.
      dtype: type of the activations.
      alias: name under which the model was published, where it is not the family's: exports have it again.
      generation: what its authors generate with, and the tokens that end its texts. Models that differ in nothing else
        are equal.

    Example:
      >>> tokens = jnp.array([[72, 105]])
      >>> model.apply({"params": params}, tokens).shape  # [batch, tokens, vocabulary]
      (1, 2, 257)
      >>> cache = model.init_cache(params, batch=1, slots=8)
      >>> logits, cache = model.apply({"params": params}, tokens, cache=cache)
      >>> int(cache.length)
      2
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    alias: str | None = None
    generation: GenerationOptions = field(default=GenerationOptions(), compare=False)
    block: ClassVar[type[Block]]
    begins_with_bos: ClassVar[bool] = False
    """The model is far worse on texts without a BOS token in front of them."""

    @property
    def first_token(self) -> int | None:
        """Token to be put in front of each text that is cut out of a longer one: BOS, for families that need it."""
        bos = self.generation.content.get("bos_token_id")
        return bos if self.begins_with_bos and isinstance(bos, int) else None

    def norm_module(self) -> nn.Module:
        """The norm after the last block."""
        raise NotImplementedError

    def embedding_module(self) -> nn.Module:
        """The embedding of tokens: a module with a table `embedding`."""
        return Embedding(self.config.vocab_size, self.config.hidden_size)

    def setup(self) -> None:
        self.embed_tokens: Any = self.embedding_module()
        self.layers = [self.block(self.config, index) for index in range(self.config.num_layers)]
        self.norm = self.norm_module()
        # Of a tied model, only `unpacked.in_rows` makes parameters for it.
        self.lm_head = Linear(self.config.vocab_size)

    def __call__(
        self,
        tokens: Integer[Array | np.ndarray, "batch tokens"],
        *,
        mask: Bool[Array | np.ndarray, "batch tokens"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "batch tokens vocabulary"] | tuple[Float[Array, "batch tokens vocabulary"], KVCache]:
        """Next-token logits; `mask` is False at padding (left padding where a cache is used)."""
        hidden, cache = self.hidden_states(tokens, mask=mask, cache=cache)
        logits = self.head(hidden)
        return logits if cache is None else (logits, cache)

    def hidden_states(
        self,
        tokens: Integer[Array | np.ndarray, "batch tokens"],
        *,
        mask: Bool[Array | np.ndarray, "batch tokens"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache | None]:
        """Input of the head, which is the normalized output of the last block, and the cache with the new tokens."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        context, valid = make_context(mask, cache)
        context = replace(context, mesh=mesh_of(self.variables))
        hidden = self.embed(tokens, context.positions)
        blocks: Any = None if cache is None else cache.blocks
        if "blocks" in self.variables["params"]:
            hidden, blocks = self._scan(hidden, blocks, context)
        else:
            hidden, blocks = self._unrolled(hidden, blocks, context)
        if cache is not None:
            cache = KVCache(blocks, valid, cache.length + tokens.shape[1])
        return self.norm(hidden), cache

    def _unrolled(
        self, hidden: Array, caches: tuple[State, ...] | None, context: Context
    ) -> tuple[Array, tuple[State, ...]]:
        """Runs block by block, each with its own parameters and its own part of the cache."""
        written = []
        for layer, block_cache in zip(self.layers, caches or [{}] * len(self.layers), strict=True):
            after = layer({"hidden": hidden, **block_cache}, context)
            hidden = after.pop("hidden")
            written.append(after)
        return hidden, tuple(written)

    def _scan(self, hidden: Array, caches: State | None, context: Context) -> tuple[Array, State]:
        """Scans over stacked parameters; of several kinds of blocks, each is compiled once."""
        block, blocks = self.new_block(), self.variables["params"]["blocks"]

        def run(carry: tuple[Array, State], index: Array, params: Params) -> tuple[Array, State]:
            hidden, caches = carry
            after: Any = block.apply({"params": params}, {"hidden": hidden, **caches}, replace(context, layer=index))
            return after.pop("hidden"), after

        def step(carry: tuple[Array, State], inputs: tuple[Array, Any]) -> tuple[tuple[Array, State], None]:
            index, params = inputs
            if not isinstance(blocks, BlockKinds):
                return run(carry, index, params), None
            kind, place = params

            def of_kind(stack: Params) -> Callable[[], tuple[Array, State]]:
                return lambda: run(carry, index, jax.tree.map(lambda array: jnp.asarray(array)[place], stack))

            return jax.lax.switch(kind, [of_kind(stack) for stack in blocks.stacks]), None

        of_blocks = blocks.indices() if isinstance(blocks, BlockKinds) else blocks
        return jax.lax.scan(step, (hidden, caches or {}), (jnp.arange(self.config.num_layers), of_blocks))[0]

    def new_block(self, index: int = 0) -> Block:
        """Makes one block, not bound to parameters: `block.apply({"params": params["layers_0"]}, state, context)`.

        Blocks of one kind are equal, so that they share compiled programs.
        """
        alike = (one for one in range(index + 1) if self.config.attention(one) == self.config.attention(index))
        return self.block(self.config, next(alike), parent=None)

    def embed(
        self,
        tokens: Integer[Array | np.ndarray, "batch tokens"],
        positions: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        """Input of the first block; without positions, those of sequences without padding."""
        return look_up(self.embed_tokens.embedding, tokens, self.dtype)

    def head(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocabulary"]:
        """Logits of hidden states."""
        if self.config.tie_embeddings and not self.has_variable("params", "lm_head"):
            logits = tied_logits(hidden, self.embed_tokens.embedding)
        else:
            logits = self.lm_head(hidden)
        # A packed head has whole groups of rows, those at its end of no token.
        return logits if logits.shape[-1] == self.config.vocab_size else logits[..., : self.config.vocab_size]

    def init_cache(self, params: Params, batch: int, slots: int, dtype: DTypeLike | None = None) -> KVCache:
        """An empty cache for `slots` tokens of each of `batch` sequences, stacked where the parameters are.

        Its type is that of the activations, unless given.
        """
        count, heads, head_dim = self.config.num_layers, self.config.num_kv_heads, self.config.head_dim

        def empty(*leading: int) -> State:
            shapes = {"keys": (batch, heads, slots, head_dim), "values": (batch, heads, head_dim, slots)}
            return {name: jnp.zeros((*leading, *shape), dtype or self.dtype) for name, shape in shapes.items()}

        return KVCache(
            blocks=empty(count) if "blocks" in params else tuple(empty() for _ in range(count)),
            valid=jnp.zeros((batch, slots), bool),
            length=jnp.zeros((), jnp.int32),
        )


def make_context(
    mask: Bool[Array | np.ndarray, "batch tokens"], cache: KVCache | None = None
) -> tuple[Context, Bool[Array, "batch slots"]]:
    """Makes positions and causal mask of new tokens, and the mask of the slots that are valid once they are written."""
    batch, tokens = mask.shape
    if cache is None:
        valid, offset, seen = jnp.asarray(mask), jnp.zeros((), jnp.int32), jnp.zeros((batch, 1), jnp.int32)
    else:
        valid = jax.lax.dynamic_update_slice(cache.valid, mask, (jnp.int32(0), cache.length))
        offset, seen = cache.length, cache.valid.sum(axis=1, keepdims=True)
    positions = jnp.maximum(seen + jnp.cumsum(mask, axis=1) - 1, 0)
    causal = jnp.arange(valid.shape[1]) <= (offset + jnp.arange(tokens))[:, None]
    slot_positions = (jnp.cumsum(valid, axis=1) - 1) * valid
    return Context(positions, causal & valid[:, None, :], slot_positions, offset), valid


def fused_name(names: tuple[str, ...]) -> str:
    """Key of fused matrices in a block's parameters."""
    return "+".join(names)


def layer_name(index: int) -> str:
    """Key of block `index` in an unstacked parameter tree."""
    return f"layers_{index}"
