"""Quantizing one block: its matrices stage by stage, each solved for the inputs that it will get."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pallas_kernels import SpqrTensor, join_rows, trim
from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Block, Params
from spqr_jax.models.experts import kernel_of, layer_of, with_kernels
from spqr_jax.quantization.checks import check_factorized, check_hidden
from spqr_jax.quantization.hidden_states import Streams
from spqr_jax.quantization.refit import refit_kernels
from spqr_jax.quantization.report import MatrixReport, relative_errors, report_matrix
from spqr_jax.quantization.solver import quantize_shared
from spqr_jax.quantization.walk import BlockWalk, SharedInput
from spqr_jax.rules import Plan
from spqr_jax.runtime.lapack import in_one_thread
from spqr_jax.runtime.memory import release_freed
from spqr_jax.runtime.placement import ONE_DEVICE, Placement, to_host
from spqr_jax.runtime.tracing import is_traced

LARGE_HESSIAN = 2048**2
"""Numbers in a Hessian from which freed memory is released before its matrices are solved."""


class QuantizedBlock(NamedTuple):
    """One finished block: its name, its parameters, and a report per matrix (`layers_3.q_proj`)."""

    name: str
    params: Params
    report: dict[str, MatrixReport]


class Solved(NamedTuple):
    """One quantized matrix: packed, and reported."""

    packed: SpqrTensor
    report: MatrixReport


def quantize_block(
    block: Block,
    name: str,
    params: Params,
    streams: Streams | None,
    plan: Plan,
    placement: Placement = ONE_DEVICE,
) -> tuple[QuantizedBlock, Streams | None]:
    """Quantizes one block, and carries the hidden states of the calibration sequences to its output.

    Args:
      block: the block, see `Decoder.new_block`.
      name: its name in messages and reports.
      params: its parameters, dense.
      streams: hidden states before it, see `hidden_states.start`; None rounds to nearest.
      plan: what to quantize its matrices to.
      placement: devices that share the work, and memory for the hidden states.

    Raises:
      SpqrError: hidden states or Hessians are not finite.

    Example:
      >>> from spqr_jax.quantization.hidden_states import embed, start
      >>> streams = start(embed(model, params, calibration), COMPACT)
      >>> block, streams = quantize_block(model.new_block(), "layers_0", params["layers_0"], streams, Plan(COMPACT))
      >>> list(block.report)[:2]
      ['layers_0.q_proj', 'layers_0.k_proj']
    """
    # Converted once here, not at each use.
    dense = jax.tree.map(placement.put_parameter, params)
    solved: dict[str, Solved] = {}
    if streams is None:
        for matrix in block.single_matrices():
            config = plan.find(f"{name}.{layer_of(matrix)}")
            if config is not None:
                solved |= round_to_nearest(matrix, dense, config, name, placement)
    else:
        walk = BlockWalk(block, dense, streams, placement, sequential=plan.config.sequential)
        for shared in walk:
            for config, part in _by_config(shared, plan, name):
                found, weights = solve_input(part, dense, config, name, placement)
                solved |= found
                walk.replace(weights)
        streams = walk.finish()
        check_hidden(streams, name)
    kernels = {matrix: s.packed for matrix, s in solved.items()}
    report = {f"{name}.{matrix}": s.report for matrix, s in solved.items()}
    return QuantizedBlock(name, with_kernels(params, kernels), report), streams


def _by_config(shared: SharedInput, plan: Plan, block_name: str) -> Iterator[tuple[SpqrConfig, SharedInput]]:
    """The matrices of an input that are not left dense, those of one configuration together."""
    found: dict[SpqrConfig, list[str]] = {}
    for matrix in shared.matrices:
        config = plan.find(f"{block_name}.{layer_of(matrix)}")
        if config is not None:
            found.setdefault(config, []).append(matrix)
    if len(found) == 1:
        ((config, matrices),) = found.items()
        yield config, shared.only(tuple(matrices))
    elif found:
        moments = shared.take_moments()
        for config, matrices in found.items():
            yield config, SharedInput(tuple(matrices), moments, shared.pooled)


def solve_input(
    shared: SharedInput, params: Params, config: SpqrConfig, block_name: str, placement: Placement
) -> tuple[dict[str, Solved], dict[str, Float[Array, "_ in"]]]:
    """Refits and quantizes the matrices of one input; also returns their dequantized weights."""
    moments = shared.take_moments()
    # JAX dispatches asynchronously: wait, so that pending work is not counted as solver time.
    jax.block_until_ready(moments)
    # Releasing memory slows the next allocation, so do it only where large Hessians set the peak.
    if moments.hessian.size >= LARGE_HESSIAN:
        release_freed()
    started = time.perf_counter()
    kernels = tuple(kernel_of(params, matrix) for matrix in shared.matrices)
    shrinkage = config.shrinkage * moments.sampling_noise
    weights = in_one_thread(refit_kernels, kernels, moments.hessian, moments.drift, shrinkage, placement)
    hessian = moments.hessian
    del moments  # the drift may be larger than the matrices, and the solver does not need it
    return _quantize(
        shared.matrices, weights, hessian, shrinkage, config, block_name, placement, started, shared.pooled
    )


def round_to_nearest(
    matrix: str, params: Params, config: SpqrConfig, block_name: str, placement: Placement
) -> dict[str, Solved]:
    """Quantizes one matrix without calibration."""
    started = time.perf_counter()
    weights = (_transposed(kernel_of(params, matrix)),)
    return _quantize((matrix,), weights, None, 0.0, config, block_name, placement, started)[0]


def _quantize(
    matrices: tuple[str, ...],
    weights: tuple[Float[Array, "_ in"], ...],
    hessian: Float[Array, "in in"] | None,
    shrinkage: Float[ArrayLike, ""],
    config: SpqrConfig,
    block_name: str,
    placement: Placement,
    started: float,
    pooled: bool | Bool[Array, ""] = False,
) -> tuple[dict[str, Solved], dict[str, Float[Array, "_ in"]]]:
    """Quantizes and reports on matrices of one input, whose work `started` at this time."""
    packed, dense, finite = quantize_shared(weights, hessian, config, placement, shrinkage)
    errors = relative_errors(weights, dense, hessian)
    seconds = float("nan")
    if not is_traced(finite):
        check_factorized(bool(finite), block_name, matrices, config)
        if placement.mesh is None:
            packed = tuple(trim(tensor) for tensor in packed)
        else:
            packed = tuple(_joined(tensor, len(weight)) for tensor, weight in zip(packed, weights, strict=True))
        seconds = time.perf_counter() - started
    total = sum(weight.size for weight in weights)
    solved = {
        matrix: Solved(tensor, report_matrix(tensor, error, seconds * weight.size / total, pooled))
        for matrix, tensor, error, weight in zip(matrices, packed, errors, weights, strict=True)
    }
    return solved, dict(zip(matrices, dense, strict=True))


def _joined(parts: SpqrTensor, out: int) -> SpqrTensor:
    """The matrix from the rows that each device has packed."""
    if parts.outliers is not None:
        # Move only the room that outliers need; powers of two, so that few programs are compiled.
        most = int(to_host(jnp.asarray(parts.outliers.offsets))[:, -1].max())
        parts = replace(parts, outliers=parts.outliers.crop(1 << max(most - 1, 0).bit_length()))
    return jax.device_put(join_rows(jax.tree.map(to_host, parts), out))


@jax.jit
def _transposed(kernel: Float[Array, "in out"]) -> Float[Array, "out in"]:
    return kernel.T
