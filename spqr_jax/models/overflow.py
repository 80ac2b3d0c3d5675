"""Finds where a forward pass left the range of the model's type, after its result was not finite."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from spqr_jax.models.decoder import Block, Context, Decoder, Params, make_context
from spqr_jax.models.layers import mesh_of
from spqr_jax.models.stacked_blocks import block_names, unstack_blocks


def first_overflow(model: Decoder, params: Params, tokens: Integer[np.ndarray | Array, "batch tokens"]) -> str | None:
    """Name of the first part of a model whose output is not finite: a key of its parameters, or `head`.

    Runs the model block by block.

    Returns:
      `embed_tokens`, `layers_0`, …, `norm` or `head`; None where all outputs are finite.

    Example:
      >>> first_overflow(model, params, calibration[:1]) is None
      True
      >>> large = params["layers_1"]["down_proj"] | {"kernel": params["layers_1"]["down_proj"]["kernel"] * 1e38}
      >>> first_overflow(model, params | {"layers_1": params["layers_1"] | {"down_proj": large}}, calibration[:1])
      'layers_1'
    """
    for name, output in _outputs(model, unstack_blocks(params), tokens):
        if not jnp.isfinite(output).all():
            return name
    return None


def describe_overflow(model: Decoder, params: Params, tokens: Integer[np.ndarray | Array, "batch tokens"]) -> str:
    """Where the pass over tokens became not finite, and the remedy: the end of an error message.

    Example:
      >>> describe_overflow(model, params | {"norm": {"scale": params["norm"]["scale"] * np.nan}}, calibration[:1])
      "the output of norm is not finite in float32: check the model's parameters"
    """
    name = first_overflow(model, params, tokens)
    subject = "the logits are" if name is None else f"the output of {name} is"
    dtype = jnp.dtype(model.dtype)
    remedy = "check the model's parameters"
    if dtype == jnp.float16:
        remedy = "its numbers end at 65504, so choose dtype bfloat16 or float32"
    return f"{subject} not finite in {dtype.name}: {remedy}"


def _outputs(
    model: Decoder, params: Params, tokens: Integer[np.ndarray | Array, "batch tokens"]
) -> Iterator[tuple[str, Float[Array, "batch tokens _"]]]:
    """Yields name and output of each part of a model, its blocks unstacked."""
    apply: Any = partial(model.apply, {"params": params})
    context, _ = make_context(np.ones(tokens.shape, bool))
    context = replace(context, mesh=mesh_of(params))
    hidden = apply(tokens, method="embed")
    yield "embed_tokens", hidden
    for index, name in enumerate(block_names(params)):
        hidden = _run(model.new_block(index), params[name], hidden, context)
        yield name, hidden
    hidden = apply(hidden, method=lambda module, hidden: module.norm(hidden))
    yield "norm", hidden
    yield "head", apply(hidden, method="head")


@partial(jax.jit, static_argnums=0)
def _run(
    block: Block, params: Params, hidden: Float[Array, "batch tokens hidden"], context: Context
) -> Float[Array, "batch tokens hidden"]:
    after: Any = block.apply({"params": params}, {"hidden": hidden}, context)
    return after["hidden"]
