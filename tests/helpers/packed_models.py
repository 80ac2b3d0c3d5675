"""Models whose matrices have random content, packed or dense."""

import math
from typing import Any

import jax
import numpy as np
from helpers.random_packed import packed_of_three_bits

from pallas_kernels.format.stacks import stack
from spqr_jax.models import Decoder

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)


LOGITS = jax.jit(
    lambda model, params, tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs), static_argnums=0
)


def dense_params(model: Decoder) -> dict[str, Any]:
    """Random parameters, all dense, small enough that hidden states keep their size."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda leaf: rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32), shapes)


def random_params(model: Decoder, *, share: float | None = 0.02, one_permutation: bool = True) -> dict[str, Any]:
    """Random parameters, every matrix packed; `share` of the weights are outliers, None: packed without."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape, np.float32), shapes)
    for index in range(model.config.num_layers):
        block = params[f"layers_{index}"]
        for names in model.new_block().feeds().values():
            permutation = rng.permutation(block[names[0]]["kernel"].shape[-2])
            order = permutation if one_permutation else "random"
            for name in names:
                *experts, columns, out = block[name]["kernel"].shape
                kernels = [
                    packed_of_three_bits(rng, out, columns, share=share, largest=0.2, permutation=order)
                    for _ in range(math.prod(experts))
                ]
                block[name]["kernel"] = stack(kernels) if experts else kernels[0]
    return params
