"""Fuses matrices that share an input: a block then launches fewer products, each of more rows."""

from dataclasses import replace

import jax.numpy as jnp

from pallas_kernels import SpqrTensor, concatenate_rows
from pallas_kernels.format.rows import why_not_one
from spqr_jax.models.block_kinds import BlockKinds
from spqr_jax.models.decoder import Decoder, Params, fused_name
from spqr_jax.models.stacked_blocks import block_names


def fuse_projections(params: Params, model: Decoder) -> Params:
    """Concatenates packed matrices that multiply the same input, in every block; nothing is solved again.

    In a LLaMA those are q, k and v, and gate and up, so that a block has four products in place of seven. The block's
    stages declare them. The models run from either form, with the same results: y = x [ŵ_0; ŵ_1; …]ᵀ is split into the
    products. Matrices stay separate where they are dense or split over devices, or differ in permutation or format.

    Args:
      params: parameters of `model`, stacked or not; those already fused are returned unchanged.
      model: the Flax module.

    Returns:
      Parameters in which, for example, `layers_0` has `q_proj+k_proj+v_proj` in the place of three entries. They can be
      saved and loaded, but other projects' formats have no such matrices: export the original parameters.

    Example:
      >>> fused = fuse_projections(quantized, model)
      >>> sorted(name for name in fused["layers_0"] if "+" in name)
      ['gate_proj+up_proj', 'q_proj+k_proj+v_proj']
    """
    if isinstance(params.get("blocks"), BlockKinds):
        kinds = params["blocks"]
        return {**params, "blocks": replace(kinds, stacks=tuple(_fused(stack, model) for stack in kinds.stacks))}
    return {**params, **{name: _fused(params[name], model) for name in block_names(params)}}


def _fused(block: Params, model: Decoder) -> Params:
    for names in model.new_block().feeds().values():
        if len(names) > 1 and _can_join(block, names):
            block = _join(block, names)
    return block


def _can_join(block: Params, names: tuple[str, ...]) -> bool:
    layers = [block.get(name, {}) for name in names]
    kernels = [layer.get("kernel") for layer in layers]
    packed = all(isinstance(kernel, SpqrTensor) for kernel in kernels)
    return packed and len({frozenset(layer) for layer in layers}) == 1 and why_not_one(kernels) is None


def _join(block: Params, names: tuple[str, ...]) -> Params:
    """Fuses some of a block's linear layers."""
    layers = [block[name] for name in names]
    joined: Params = {"kernel": concatenate_rows([layer["kernel"] for layer in layers])}
    if "bias" in layers[0]:
        joined["bias"] = jnp.concatenate([layer["bias"] for layer in layers], axis=-1)
    return {key: value for key, value in block.items() if key not in names} | {fused_name(names): joined}
