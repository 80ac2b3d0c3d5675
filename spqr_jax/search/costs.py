"""Estimates of what each setting would cost each matrix: bytes, and divergence from the original model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import spqr_dequantize
from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Block, Decoder, Params, layer_name
from spqr_jax.models.ending import EMBEDDING, end_names, head_name, leaf_name
from spqr_jax.models.experts import kernel_of, layer_of, with_kernels
from spqr_jax.quantization.checks import check_factorized, check_hidden, check_tokens, check_weights
from spqr_jax.quantization.ends import quantize_end
from spqr_jax.quantization.factorize import factorize
from spqr_jax.quantization.hidden_states import Streams, embed
from spqr_jax.quantization.solver import quantize_factored
from spqr_jax.quantization.walk import BlockWalk
from spqr_jax.rules import Plan
from spqr_jax.runtime.lapack import in_one_thread
from spqr_jax.runtime.placement import ONE_DEVICE, to_host
from spqr_jax.runtime.x64 import in_32_bits
from spqr_jax.search.allocation import Option
from spqr_jax.search.fisher import output_of_block, slopes_of_block, slopes_of_embedding, slopes_of_ending
from spqr_jax.search.target_bits import trimmed_bytes
from spqr_jax.storage.model_source import ModelSource

MOST_SEQUENCES = 32
"""Most calibration sequences that are used; each gives one sample of the Fisher information."""

TINY = 1e-30
"""Instead of the error of a matrix of zeros, which has none."""

Options = list[tuple[float, float]]
"""Bytes and e / e₁ of a matrix with each setting."""


@in_32_bits
def estimate_costs(
    source: ModelSource,
    calibration_tokens: Int[ArrayLike, "sequences tokens"],
    settings: Sequence[SpqrConfig],
    ends: Sequence[Mapping[str, Any]] = (),
) -> dict[str, list[Option]]:
    """The bytes of each matrix of a model with each setting, and the divergence that it alone would cause.

    A matrix is solved with each setting for its inputs in the original model; that gives bytes, and the error
    e = ‖(W − Ŵ) X‖². Along W − Ŵ of the first setting the Fisher information F gives the divergence ½ F, see `fisher`.
    That of another setting is ½ F e / e₁: what an error at this place does does not depend on the setting. Blocks are
    taken from the last to the first, with one block's weights in memory at a time, and the states before all blocks.

    Args:
      source: the model.
      calibration_tokens: token ids of sequences of equal length.
      settings: what matrices of blocks may be quantized to; all with the same permutation, damping and shrinkage.
      ends: settings that embedding and head may get by rules; if there are none, they are left out.

    Returns:
      For each name of `rules.matrix_paths`, an option for each setting, of bytes and nats per token.

    Raises:
      SpqrError: as for `quantize`.

    Example:
      >>> costs = estimate_costs(source, calibration, [COMPACT, NEAR_LOSSLESS])
      >>> small, large = costs["layers_0.q_proj"]
      >>> small.size < large.size, small.cost > large.cost
      (True, True)
    """
    model, tokens = source.model, np.asarray(calibration_tokens)[:MOST_SEQUENCES]
    read = partial(_checked_part, source, settings[0])
    check_tokens(tokens, read(layer_name(0)), model)
    states = _states(model, read, tokens)
    head, last = head_name(model), states.pop()
    ending = {name: read(name) if name in source.parts else {} for name in ("norm", head)}
    plans = [Plan(settings[0], (("*", one),)) for one in ends]
    solved = {end: _solve_end(model, end, ending | {end: read(end)}, last, plans) for end in end_names(model) if plans}
    direction = {"norm": jax.tree.map(jnp.zeros_like, ending["norm"]), head: solved[head][1]} if ends else None
    gradients, slopes_of_head = slopes_of_ending(model, ending, direction, jnp.asarray(last), jax.random.key(0))
    costs: dict[str, list[Option]] = {}
    del ending, direction

    def add(name: str, found: Options, slopes: Float[Array, " sequences"]) -> None:
        divergence = float(jnp.square(slopes).sum()) / tokens.size / 2
        costs[name] = [Option(size, divergence * share) for size, share in found]

    for index in reversed(range(model.config.num_layers)):
        block, params, hidden = model.new_block(index), read(layer_name(index)), states.pop()
        options, directions = _solve_block(block, layer_name(index), params, hidden, settings)
        gradients, slopes = slopes_of_block(block, params, directions, hidden, gradients)
        for name, found in options.items():
            add(f"{layer_name(index)}.{name}", found, slopes[name])
    for name, (found, moved) in solved.items():
        own = slopes_of_head if name == head else jnp.zeros(len(tokens))
        if name == EMBEDDING:
            own += slopes_of_embedding(model, read(name), moved, jnp.asarray(tokens), gradients)
        add(name, found, own)
    return costs


def _states(
    model: Decoder, read: Callable[[str], Params], tokens: Int[np.ndarray, "sequences tokens"]
) -> list[Float[np.ndarray, "sequences tokens hidden"]]:
    """States before each block and after the last one."""
    states = [np.asarray(embed(model, {EMBEDDING: read(EMBEDDING)}, tokens))]
    for index in range(model.config.num_layers):
        states.append(_after(model.new_block(index), read(layer_name(index)), states[-1]))
        check_hidden(states[-1], layer_name(index))
    return states


def _checked_part(source: ModelSource, config: SpqrConfig, name: str) -> Params:
    """A part of the parameters on the device, in float32."""
    part = source.parts[name]()
    check_weights({name: part}, source.model, Plan(config))
    return jax.tree.map(ONE_DEVICE.put_parameter, part)


def _after(
    block: Block, params: Params, hidden: Float[np.ndarray, "sequences tokens hidden"]
) -> Float[np.ndarray, "sequences tokens hidden"]:
    """States after a block, computed one sequence at a time."""
    return np.stack([to_host(output_of_block(block, params, one[None]))[0] for one in hidden])


def _solve_block(
    block: Block,
    block_name: str,
    params: Params,
    hidden: Float[np.ndarray, "sequences tokens hidden"],
    settings: Sequence[SpqrConfig],
) -> tuple[dict[str, Options], dict[str, Float[Array, "*experts in out"]]]:
    """Solves the matrices of a block with each setting.

    Returns:
      Bytes and e / e₁ with each setting, and Ŵ − W of the first one as a kernel, by the names of `Block.matrices`.
    """
    sizes, errors = ({name: np.zeros(len(settings)) for name in block.matrices()} for _ in range(2))
    directions: dict[str, Array] = {}
    for shared in BlockWalk(block, params, Streams({"hidden": hidden}, None)):
        moments = shared.take_moments()
        factor = in_one_thread(factorize, moments.hessian, settings[0], settings[0].shrinkage * moments.sampling_noise)
        weights = tuple(kernel_of(params, matrix).T for matrix in shared.matrices)
        for place, config in enumerate(settings):
            packed, dense, finite = quantize_factored(weights, factor, config, ONE_DEVICE)
            check_factorized(bool(finite), block_name, shared.matrices, config)
            changes = tuple(approximation - weight for approximation, weight in zip(dense, weights, strict=True))
            for matrix, own, change in zip(shared.matrices, packed, changes, strict=True):
                sizes[layer_of(matrix)][place] += trimmed_bytes(
                    own, 0 if own.outliers is None else int(own.outliers.count)
                )
                errors[layer_of(matrix)][place] += float(_error(change, moments.hessian))
            if place == 0:
                directions |= {matrix: change.T for matrix, change in zip(shared.matrices, changes, strict=True)}
    found = {
        name: [
            (float(size), float(error / max(errors[name][0], TINY)))
            for size, error in zip(sizes[name], errors[name], strict=True)
        ]
        for name in block.matrices()
    }
    stacked = with_kernels({name: {} for name in block.matrices()}, directions)
    return found, {name: layer["kernel"] for name, layer in stacked.items()}


def _solve_end(
    model: Decoder,
    name: str,
    params: Params,
    hidden: Float[np.ndarray, "sequences tokens hidden"],
    plans: Sequence[Plan],
) -> tuple[Options, Params]:
    """Bytes and e / e₁ of the embedding or the head with each plan, and Ŵ − W of the first one as this part."""
    leaf, sizes, errors = leaf_name(name), [], []
    for plan in plans:
        block = quantize_end(model, name, params, Streams({"hidden": hidden}, None), plan)
        packed, (report,) = block.params[leaf], block.report.values()
        sizes.append(trimmed_bytes(packed, 0 if packed.outliers is None else int(packed.outliers.count)))
        errors.append(report.relative_error)
        if len(errors) == 1:
            dense = spqr_dequantize(packed) if name == EMBEDDING else spqr_dequantize(packed).T
            # Behind the vocabulary are rows of zeros.
            dense = dense[tuple(map(slice, params[name][leaf].shape))]
            direction = jax.tree.map(jnp.zeros_like, params[name]) | {leaf: dense - params[name][leaf]}
    return [(float(size), error / max(errors[0], TINY)) for size, error in zip(sizes, errors, strict=True)], direction


@jax.jit
def _error(change: Float[Array, "out in"], hessian: Float[Array, "in in"]) -> Float[Array, ""]:
    """‖(W − Ŵ) X‖², from H = X Xᵀ."""
    return jnp.vdot(change, change @ hessian)
