"""Quantizing the embedding and the head, once all blocks are quantized."""

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.ending import EMBEDDING, ending, head_name, leaf_name
from spqr_jax.quantization.block import QuantizedBlock, round_to_nearest, solve_input
from spqr_jax.quantization.checks import rows_together
from spqr_jax.quantization.hidden_states import Streams
from spqr_jax.quantization.walk import BlockWalk
from spqr_jax.rules import Plan
from spqr_jax.runtime.placement import ONE_DEVICE, Placement
from spqr_jax.runtime.tracing import is_traced


def quantize_end(
    model: Decoder,
    name: str,
    params: Params,
    streams: Streams | None,
    plan: Plan,
    placement: Placement = ONE_DEVICE,
) -> QuantizedBlock:
    """Quantizes the embedding or the head.

    The head is solved for the final hidden states of the calibration sequences, also where it is the embedding. An
    embedding that is no head is rounded to nearest: of its products with a token, each is one of its rows.

    Args:
      model: the Flax module.
      name: `embed_tokens` or `lm_head`.
      params: this part of the parameters, and `norm`; dense.
      streams: hidden states after the last block; None rounds to nearest.
      plan: what to quantize to.
      placement: devices that share the work, and memory for the hidden states.

    Returns:
      The part, packed, with rows of zeros at its end where the vocabulary does not fill the format's groups of rows.

    Raises:
      SpqrError: hidden states or the Hessian are not finite.

    Example:
      >>> quantize_end(model, "lm_head", params, None, Plan(COMPACT)).params["kernel"].bits
      8
    """
    config = plan.find(name)
    assert config is not None
    leaf, tied = leaf_name(name), model.config.tie_embeddings
    kernel = params[name][leaf].T if name == EMBEDDING else params[name][leaf]
    # In host memory, from which each device reads its part, where it is known.
    pad = jnp.pad if is_traced(kernel) else np.pad
    kernel = pad(kernel, ((0, 0), (0, -kernel.shape[1] % rows_together(config))))
    dense = jax.tree.map(placement.put_parameter, {"norm": params.get("norm", {}), name: {"kernel": kernel}})
    if streams is None or name != head_name(model):
        solved = round_to_nearest(name, dense, config, name, placement)
    else:
        # A table in which tokens are looked up, too, is not refitted.
        streams = Streams(streams.quantized, None if tied else streams.original)
        (shared,) = BlockWalk(ending(model), dense, streams, placement)
        solved, _ = solve_input(shared, dense, config, "norm", placement)
    packed, report = solved[name]
    return QuantizedBlock(name, {**params[name], leaf: packed}, {name: report})
