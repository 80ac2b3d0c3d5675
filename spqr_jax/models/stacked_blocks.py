"""Stacks the subtrees of all blocks along a leading axis, over which the forward pass scans, and unstacks them."""

import jax
import numpy as np
from jax import Array

from pallas_kernels import SplitTensor, SpqrTensor
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.stacks import element, pad, stack, stack_arrays
from spqr_jax.models.decoder import Params, layer_name

Leaf = Array | np.ndarray | SpqrTensor | SplitTensor


def stack_blocks(params: Params) -> Params:
    """Replaces `layers_0` … `layers_{n-1}` by `blocks`, whose leaves have a leading axis of length n.

    Packed matrices are padded to the largest number of outliers among the blocks, with zeros, which add nothing to a
    product. Parameters that are stacked already are returned unchanged.

    Args:
      params: parameters of a `Decoder`.

    Raises:
      SpqrError: there are no blocks, or they differ in structure, as when only some of them are quantized.

    Example:
      >>> stack_blocks(params)["blocks"]["q_proj"]["kernel"].shape  # [blocks, in, out]
      (2, 64, 64)
    """
    if "blocks" in params:
        return params
    layers = alike_layers(params)
    rest = {key: value for key, value in params.items() if key not in layers}
    return {**rest, "blocks": jax.tree.map(_stack, *layers.values(), is_leaf=_is_matrix)}


def unstack_blocks(params: Params) -> Params:
    """Inverse of `stack_blocks`: `blocks` becomes `layers_0` … `layers_{n-1}`, without the padding of the outliers.

    Args:
      params: parameters of a `Decoder`; those without `blocks` are returned unchanged.

    Example:
      >>> sorted(unstack_blocks(stack_blocks(params)))
      ['embed_tokens', 'layers_0', 'layers_1', 'lm_head', 'norm']
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

    A program for a GPU then compiles each kernel once for all blocks, and reads every array in place. Of stacked
    arrays, each kernel would be passed a copy of its slice.

    Args:
      params: parameters of a `Decoder`, stacked or not.

    Raises:
      SpqrError: as `stack_blocks`.

    Example:
      >>> level = level_blocks(quantized)
      >>> len({level[block]["q_proj"]["kernel"].nbytes for block in ("layers_0", "layers_1")})
      1
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
    """The blocks of unstacked parameters, or a SpqrError where they do not hold the same arrays."""
    layers = {name: params[name] for name in block_names(params)}
    if not layers:
        raise SpqrError("the parameters hold no blocks: neither 'blocks' nor 'layers_0'")
    structures: dict[str, object] = {name: jax.tree.structure(layer) for name, layer in layers.items()}
    first = layer_name(0)
    for name, structure in structures.items():
        if structure != structures[first]:
            raise SpqrError(f"{first} and {name} hold different arrays, so the blocks cannot be stacked")
    return layers


def _is_matrix(leaf: object) -> bool:
    return isinstance(leaf, SpqrTensor | SplitTensor)


def _stack(*leaves: Leaf) -> Leaf:
    if packed := [leaf for leaf in leaves if isinstance(leaf, SpqrTensor)]:
        return stack(packed)
    # The parts of a split matrix have room for the same number of outliers in every block, and stay where they are.
    return jax.tree.map(stack_arrays, *leaves)


def _unstack(leaf: Leaf, index: int) -> Leaf:
    return element(leaf, index) if isinstance(leaf, SpqrTensor) else jax.tree.map(lambda array: array[index], leaf)
