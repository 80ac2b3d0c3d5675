"""The divergence that a small change of a matrix causes, from derivatives of the model's own predictions.

If the weights move by a · D, the next-token distributions move by ½ a² E s² of Kullback-Leibler divergence, to second
order: s = ∂ log p(token) / ∂a, for tokens drawn from the model's own distribution p. E s² is the Fisher information
along D. A text of many drawn tokens gives one sample of Σ s².

Source: Martens 2020, New insights and perspectives on the natural gradient method, section 5.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spqr_jax.models.decoder import Block, Decoder, Params, make_context
from spqr_jax.models.ending import EMBEDDING, FinalNorm

POSITIONS = 128
"""Most positions whose logits are in memory at once."""


@partial(jax.jit, static_argnums=0)
def output_of_block(
    block: Block, params: Params, hidden: Float[Array, "batch tokens hidden"]
) -> Float[Array, "batch tokens hidden"]:
    """Hidden states after a block, from those before it."""
    context, _ = make_context(jnp.ones(hidden.shape[:2], bool))
    after: Any = block.apply({"params": params}, {"hidden": hidden}, context)
    return after["hidden"]


@partial(jax.jit, static_argnums=0)
def slopes_of_ending(
    model: Decoder,
    ending: Params,
    direction: Params | None,
    hidden: Float[Array, "batch tokens hidden"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, " batch"]]:
    """The gradients of Σ log p(token) at the last block's output, and the derivatives s along a direction of the head.

    Args:
      model: the Flax module.
      ending: parameters of the final norm and the head, dense.
      direction: D of each of them; None for none.
      hidden: the last block's output.
      key: of the drawn tokens, one at each position.
    """

    def step(_: None, inputs: tuple[Float[Array, "positions hidden"], PRNGKeyArray]) -> tuple[None, Any]:
        own, key = inputs

        def logits_of(own: Array, ending: Params) -> Array:
            features = FinalNorm(model)(ending.get("norm", {}), own)
            logits: Any = model.apply({"params": ending}, features, method="head")
            return logits.astype(jnp.float32)

        logits, pull = jax.vjp(lambda own: logits_of(own, ending), own)
        drawn = jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1])
        gradient = drawn - jax.nn.softmax(logits)
        if direction is None:
            return None, (pull(gradient)[0], jnp.zeros(()))
        moved = jax.jvp(lambda ending: logits_of(own, ending), (ending,), (direction,))[1]
        return None, (pull(gradient)[0], jnp.vdot(gradient, moved))

    flat = hidden.reshape(-1, hidden.shape[-1])
    steps = len(flat) // math.gcd(hidden.shape[1], POSITIONS)
    inputs = flat.reshape(steps, -1, flat.shape[1]), jax.random.split(key, steps)
    gradients, slopes = jax.lax.scan(step, None, inputs)[1]
    return gradients.reshape(hidden.shape), slopes.reshape(len(hidden), -1).sum(1)


@partial(jax.jit, static_argnums=0)
def slopes_of_embedding(
    model: Decoder,
    params: Params,
    direction: Params,
    tokens: Int[Array, "batch tokens"],
    gradients: Float[Array, "batch tokens hidden"],
) -> Float[Array, " batch"]:
    """The derivatives s along a direction of the embedding, from the gradients at the first block's input.

    Args:
      model: the Flax module.
      params: its `embed_tokens`, dense.
      direction: D of them.
      tokens: the texts.
      gradients: at the first block's input.
    """

    def run(params: Params) -> Any:
        return model.clone(dtype=jnp.float32).apply({"params": {EMBEDDING: params}}, tokens, method="embed")

    moved = jax.jvp(run, (params,), (direction,))[1]
    return jnp.einsum("bth,bth->b", moved.astype(jnp.float32), gradients.astype(jnp.float32))


@partial(jax.jit, static_argnums=0)
def slopes_of_block(
    block: Block,
    params: Params,
    directions: Mapping[str, Float[Array, "*experts in out"]],
    hidden: Float[Array, "batch tokens hidden"],
    gradients: Float[Array, "batch tokens hidden"],
) -> tuple[Float[Array, "batch tokens hidden"], dict[str, Float[Array, " batch"]]]:
    """The gradients before a block, from those after it, and the derivatives s along directions of its matrices.

    Args:
      block: the block.
      params: its parameters, dense.
      directions: D of some kernels.
      hidden: states before the block.
      gradients: at its output.
    """

    def step(_: None, inputs: tuple[Float[Array, "tokens hidden"], Float[Array, "tokens hidden"]]) -> tuple[None, Any]:
        own, gradient = inputs

        def run(own: Array, amounts: dict[str, Array]) -> Array:
            moved = {
                name: params[name] | {"kernel": params[name]["kernel"] + amounts[name] * direction}
                for name, direction in directions.items()
            }
            return output_of_block(block, {**params, **moved}, own[None])[0]

        return None, jax.vjp(run, own, dict.fromkeys(directions, jnp.zeros(())))[1](gradient)

    return jax.lax.scan(step, None, (hidden, gradients))[1]
