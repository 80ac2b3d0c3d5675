"""From one subtree per block to one tree with a leading axis, which the forward pass scans over, and back."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import SplitTensor, SpqrTensor
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.stacks import element, pad, stack
from spqr_jax.models.decoder import Params, layer_name


def stack_blocks(params: Params) -> Params:
    """Replaces `layers_0` … `layers_{n-1}` by `blocks`, every leaf of which has a leading axis of length n.

    The outliers of packed matrices differ in number from block to block: they are padded with zeros, which add
    nothing to a product, to the largest number among the blocks. Parameters that are stacked already are returned
    as they are.

    Args:
      params: parameters of a `Decoder`.

    Raises:
      SpqrError: there are no blocks, or they differ in structure, as when only some of them are quantized.

    Example:
      >>> model.apply({"params": stack_blocks(params)}, tokens)  # the same logits, compiled in the time of one block
    """
    if "blocks" in params:
        return params
    layers = alike_layers(params)
    rest = {key: value for key, value in params.items() if key not in layers}
    return {**rest, "blocks": jax.tree.map(_stack, *layers.values(), is_leaf=_is_matrix)}


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
        return jax.tree.map(lambda leaf: _unstack(leaf, index), params["blocks"], is_leaf=_is_matrix)

    return {**rest, **{layer_name(index): block(index) for index in range(count)}}


def level_blocks(params: Params) -> Params:
    """`layers_0` … `layers_{n-1}` with arrays of the same shapes, the outliers padded as in `stack_blocks`.

    A program for a GPU then compiles each kernel once for all blocks, and reads every array where it is: of arrays that
    are stacked, each kernel would be given a copy of its slice.

    Args:
      params: parameters of a `Decoder`, stacked or not.

    Raises:
      SpqrError: as `stack_blocks`.

    Example:
      >>> cache = model.init_cache(level_blocks(params), batch=1, slots=128)
    """
    if "blocks" in params:
        params = unstack_blocks(params)
    layers = alike_layers(params)
    leaves = [jax.tree.leaves(layer, is_leaf=_is_matrix) for layer in layers.values()]
    columns = [pad(column) if isinstance(column[0], SpqrTensor) else column for column in zip(*leaves, strict=True)]
    structure = jax.tree.structure(params[layer_name(0)], is_leaf=_is_matrix)
    rows = zip(*columns, strict=True)
    return {**params, **{name: jax.tree.unflatten(structure, row) for name, row in zip(layers, rows, strict=True)}}


def block_names(params: Params) -> list[str]:
    """Keys of the blocks: `blocks` where they are stacked, `layers_0` … `layers_{n-1}` where they are not."""
    if "blocks" in params:
        return ["blocks"]
    names: list[str] = []
    while (name := layer_name(len(names))) in params:
        names.append(name)
    return names


def alike_layers(params: Params) -> dict[str, Params]:
    """The blocks of unstacked parameters, or a ValueError where they do not hold the same arrays."""
    layers = {name: params[name] for name in block_names(params)}
    if not layers:
        raise SpqrError("the parameters hold no blocks: neither 'blocks' nor 'layers_0'")
    structures: dict[str, Any] = {name: jax.tree.structure(layer) for name, layer in layers.items()}
    first = layer_name(0)
    for name, structure in structures.items():
        if structure != structures[first]:
            raise SpqrError(f"{first} and {name} hold different arrays, so the blocks cannot be stacked")
    return layers


def _is_matrix(leaf: Any) -> bool:
    return isinstance(leaf, SpqrTensor | SplitTensor)


def _stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], SpqrTensor):
        return stack(leaves)
    # The parts of a split matrix have room for the same number of outliers in every block, and stay where they are.
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)


def _unstack(leaf: Any, index: int) -> Any:
    return element(leaf, index) if isinstance(leaf, SpqrTensor) else jax.tree.map(lambda array: array[index], leaf)
