"""Models whose matrices are packed with random content."""

from typing import Any

import jax
import numpy as np

from pallas_kernels import pack, trim
from spqr_jax.models import (
    Decoder,
)

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)


PACK = jax.jit(pack, static_argnames=("bits", "group_size"))


LOGITS = jax.jit(
    lambda model, params, tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs), static_argnums=0
)


def random_params(model: Decoder, *, share: float | None = 0.02, one_permutation: bool = True) -> dict[str, Any]:
    """Random parameters, every matrix packed; `share` of the weights are outliers, None: packed without."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape, np.float32), shapes)
    for index in range(model.config.num_layers):
        block = params[f"layers_{index}"]
        for names in model.new_block().feeds().values():
            permutation = rng.permutation(len(block[names[0]]["kernel"]))
            for name in names:
                columns, out = block[name]["kernel"].shape
                scale = rng.uniform(0.1, 0.2, (out, columns // 16)).astype(np.float32)
                outliers = rng.random((out, columns)) < (share or 0), rng.standard_normal((out, columns), np.float32)
                block[name]["kernel"] = trim(
                    PACK(
                        rng.integers(0, 8, (out, columns), np.uint8),
                        scale,
                        np.full(scale.shape, 3.5, np.float32),
                        bits=3,
                        group_size=16,
                        outliers=None if share is None else outliers,
                        permutation=permutation if one_permutation else rng.permutation(columns),
                    )
                )
    return params
