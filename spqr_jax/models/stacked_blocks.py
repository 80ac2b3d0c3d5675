"""Stacks the subtrees of all blocks along a leading axis, over which the forward pass scans, and unstacks them."""

from collections.abc import Hashable

import jax
import numpy as np
from jax import Array

from pallas_kernels import SplitTensor, SpqrTensor
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.stacks import element, form, pad, stack, stack_arrays
from spqr_jax.models.block_kinds import BlockKinds
from spqr_jax.models.decoder import Params, layer_name

Leaf = Array | np.ndarray | SpqrTensor | SplitTensor


def stack_blocks(params: Params) -> Params:
    """Replaces `layers_0` … `layers_{n-1}` by `blocks`, whose leaves have a leading axis of length n.

    Packed matrices are padded to the largest number of outliers among the blocks, with zeros, which add nothing to a
    product. Blocks that differ, as when only some are quantized, become `BlockKinds`, with a stack for each kind.
    Parameters that are stacked already are returned unchanged.

    Args:
      params: parameters of a `Decoder`.

    Raises:
      SpqrError: there are no blocks.

    Example:
      >>> stack_blocks(params)["blocks"]["q_proj"]["kernel"].shape  # [blocks, in, out]
      (2, 64, 64)
    """
    if "blocks" in params:
        return params
    layers = layers_of(params)
    rest = {key: value for key, value in params.items() if key not in layers}
    kinds = _by_kind(layers)
    stacks = [jax.tree.map(_stack, *(layers[name] for name in names), is_leaf=_is_matrix) for names in kinds]
    if len(stacks) == 1:
        return {**rest, "blocks": stacks[0]}
    found = {name: (kind, place) for kind, names in enumerate(kinds) for place, name in enumerate(names)}
    of_blocks, places = zip(*(found[name] for name in layers), strict=True)
    return {**rest, "blocks": BlockKinds(tuple(stacks), of_blocks, places)}


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
    blocks = params["blocks"]
    if isinstance(blocks, BlockKinds):
        pairs = [(blocks.stacks[kind], place) for kind, place in zip(blocks.kinds, blocks.places, strict=True)]
    else:
        pairs = [(blocks, index) for index in range(jax.tree.leaves(blocks)[0].shape[0])]

    def block(stacked: Params, place: int) -> Params:
        return jax.tree.map(lambda leaf: _unstack(leaf, place), stacked, is_leaf=_is_matrix)

    return {**rest, **{layer_name(index): block(*pair) for index, pair in enumerate(pairs)}}


def level_blocks(params: Params) -> Params:
    """`layers_0` … `layers_{n-1}`; blocks of a kind have arrays of the same shapes, padded as in `stack_blocks`.

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
    layers = layers_of(params)
    levelled: dict[str, Params] = {}
    for names in _by_kind(layers):
        leaves = [jax.tree.leaves(layers[name], is_leaf=_is_matrix) for name in names]
        columns = [pad(column) if isinstance(column[0], SpqrTensor) else column for column in zip(*leaves, strict=True)]
        structure = jax.tree.structure(layers[names[0]], is_leaf=_is_matrix)
        rows = zip(*columns, strict=True)
        levelled |= {name: jax.tree.unflatten(structure, row) for name, row in zip(names, rows, strict=True)}
    return {**params, **levelled}


def block_names(params: Params) -> list[str]:
    """Keys of the blocks: `blocks` where they are stacked, `layers_0` … `layers_{n-1}` where they are not."""
    if "blocks" in params:
        return ["blocks"]
    names: list[str] = []
    while (name := layer_name(len(names))) in params:
        names.append(name)
    return names


def layers_of(params: Params) -> dict[str, Params]:
    """The blocks of unstacked parameters, or a SpqrError where there are none."""
    layers = {name: params[name] for name in block_names(params)}
    if not layers:
        raise SpqrError("the parameters hold no blocks: neither 'blocks' nor 'layers_0'")
    return layers


def _by_kind(layers: dict[str, Params]) -> list[list[str]]:
    """The names of the blocks of each kind, in order; blocks of a kind can be stacked."""
    kinds: dict[Hashable, list[str]] = {}
    for name, layer in layers.items():
        leaves, structure = jax.tree.flatten(layer, is_leaf=_is_matrix)
        kinds.setdefault((structure, tuple(map(_form, leaves))), []).append(name)
    return list(kinds.values())


def _form(leaf: Leaf) -> Hashable:
    if isinstance(leaf, SpqrTensor):
        return form(leaf)
    if isinstance(leaf, SplitTensor):
        return form(leaf.parts), leaf.parts.outliers and leaf.parts.outliers.capacity, leaf.by
    return leaf.shape


def _is_matrix(leaf: object) -> bool:
    return isinstance(leaf, SpqrTensor | SplitTensor)


def _stack(*leaves: Leaf) -> Leaf:
    if packed := [leaf for leaf in leaves if isinstance(leaf, SpqrTensor)]:
        return stack(packed)
    # The parts of a split matrix have room for the same number of outliers in every block, and stay where they are.
    return jax.tree.map(stack_arrays, *leaves)


def _unstack(leaf: Leaf, index: int) -> Leaf:
    return element(leaf, index) if isinstance(leaf, SpqrTensor) else jax.tree.map(lambda array: array[index], leaf)
