"""From one subtree per block to one tree with a leading axis, which the forward pass scans over, and back."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import SpqrTensor
from pallas_kernels.stacks import element, stack
from spqr_jax.models.decoder import Params, layer_name


def stack_blocks(params: Params) -> Params:
    """Replaces `layers_0` … `layers_{n-1}` by `blocks`, every leaf of which has a leading axis of length n.

    The outliers of packed matrices differ in number from block to block: they are padded with zeros, which add
    nothing to a product, to the largest number among the blocks. Parameters that are stacked already are returned
    as they are.

    Args:
      params: parameters of a `Decoder`.

    Raises:
      ValueError: there are no blocks, or they differ in structure, as when only some of them are quantized.

    Example:
      >>> model.apply({"params": stack_blocks(params)}, tokens)  # the same logits, compiled in the time of one block
    """
    if "blocks" in params:
        return params
    names = block_names(params)
    if not names:
        raise ValueError("the parameters hold no blocks: neither 'blocks' nor 'layers_0'")
    layers = [params[name] for name in names]
    structures: list[Any] = [jax.tree.structure(layer) for layer in layers]
    for name, structure in zip(names, structures, strict=True):
        if structure != structures[0]:
            raise ValueError(f"{names[0]} and {name} hold different arrays, so the blocks cannot be stacked")
    rest = {key: value for key, value in params.items() if key not in names}
    return {**rest, "blocks": jax.tree.map(_stack, *layers, is_leaf=_is_packed)}


def unstack_blocks(params: Params) -> Params:
    """Inverse of `stack_blocks`: `blocks` becomes `layers_0` … `layers_{n-1}`, without the padding of the outliers.

    Args:
      params: parameters of a `Decoder`; those without `blocks` are returned as they are.

    Example:
      >>> unstack_blocks(stack_blocks(params))  # params
    """
    if "blocks" not in params:
        return params
    rest = {key: value for key, value in params.items() if key != "blocks"}
    count = jax.tree.leaves(params["blocks"])[0].shape[0]

    def block(index: int) -> Params:
        return jax.tree.map(lambda leaf: _unstack(leaf, index), params["blocks"], is_leaf=_is_packed)

    return {**rest, **{layer_name(index): block(index) for index in range(count)}}


def block_names(params: Params) -> list[str]:
    """Keys of the blocks: `blocks` where they are stacked, `layers_0` … `layers_{n-1}` where they are not."""
    if "blocks" in params:
        return ["blocks"]
    names: list[str] = []
    while (name := layer_name(len(names))) in params:
        names.append(name)
    return names


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, SpqrTensor)


def _stack(*leaves: Any) -> Any:
    return stack(leaves) if _is_packed(leaves[0]) else jnp.stack(leaves)


def _unstack(leaf: Any, index: int) -> Any:
    return element(leaf, index) if _is_packed(leaf) else leaf[index]
