"""A whole model: its blocks in order and, inside a block, its stages; each matrix solved for the inputs it will get.

Source: Dettmers et al. 2023 (arXiv 2306.03078), section 4; the order inside a block is the official code's
`--true-sequential`. Here it costs one forward pass per block, because a stage stops where its matrices are needed.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels import SplitTensor, SpqrTensor, bits_per_weight, join_rows, outlier_share, trim
from pallas_kernels.errors import SpqrError
from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Block, Decoder, Params, layer_name
from spqr_jax.models.stacked_blocks import unstack_blocks
from spqr_jax.models.token_ids import check_vocabulary
from spqr_jax.quantization.hidden_states import Allocate, Streams, advance, check_shares, embed, is_traced, start
from spqr_jax.quantization.moments import InputMoments, refit, relative_error, ridge_inverse
from spqr_jax.quantization.solver import BLOCK_ROWS, check_finite, check_matrix, quantize_shared
from spqr_jax.runtime.devices import along, by_rows, flat, put, to_host
from spqr_jax.runtime.lapack import in_one_thread
from spqr_jax.runtime.memory import release_freed

LARGE_HESSIAN = 2048**2
"""Numbers in a Hessian from which on freed memory is given back before a matrix is solved."""


class MatrixReport(NamedTuple):
    """What became of one matrix.

    Attributes:
      bits_per_weight: 8 · bytes held / number of weights.
      outlier_share: outliers / number of weights.
      relative_error: ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration inputs X (on X = I without any), W after the refit.
      seconds: wall time of the solver, shared among matrices solved together by their sizes; NaN where it was traced.
    """

    bits_per_weight: float
    outlier_share: float
    relative_error: float
    seconds: float


class QuantizedBlock(NamedTuple):
    """One finished block: its name, its parameters, and a report per matrix (`layers_3.q_proj`)."""

    name: str
    params: Params
    report: dict[str, MatrixReport]


def quantize(
    params: Params,
    calibration_tokens: Int[ArrayLike, "sequences tokens"] | None,
    *,
    model: Decoder,
    config: SpqrConfig,
    mesh: Mesh | None = None,
) -> tuple[Params, dict[str, MatrixReport]]:
    """Quantizes every matrix of the decoder blocks; embedding, norms, biases and head stay as they are.

    A pure function of its arrays. Under `jax.jit` (sensible for small models: all blocks are compiled) the outlier
    arrays keep room for every weight, and `pallas_kernels.trim` cuts them afterwards.

    Args:
      params: parameter tree of `model`, dense.
      calibration_tokens: token ids of sequences of equal length; None gives round-to-nearest.
      model: the Flax module; calibration runs in its type, but in bfloat16 for float16, see `hidden_states.embed`.
      config: what to quantize to.
      mesh: devices that share the work, all axes as one: each has its share of the calibration sequences, and solves
        its share of the rows of each matrix. H and its factor every device has whole. Not under `jax.jit`.

    Returns:
      The tree with an `SpqrTensor` in the place of each quantized kernel, and a report per matrix.

    Raises:
      SpqrError: sizes that do not fit the format, values that are not finite, token ids outside the vocabulary, too
        few tokens, or sequences that the devices cannot share evenly; the message names the tensor and the numbers.

    Example:
      >>> quantized, report = quantize(params, tokens, model=model, config=COMPACT)
      >>> logits = model.apply({"params": quantized}, prompt)
    """
    quantized = dict(unstack_blocks(params))
    report: dict[str, MatrixReport] = {}
    for block in quantize_blocks(params, calibration_tokens, model=model, config=config, mesh=mesh):
        quantized[block.name] = block.params
        report |= block.report
    return quantized, report


def quantize_blocks(
    params: Params,
    calibration_tokens: Int[ArrayLike, "sequences tokens"] | None,
    *,
    model: Decoder,
    config: SpqrConfig,
    mesh: Mesh | None = None,
) -> Iterator[QuantizedBlock]:
    """The same, block by block, for callers that show progress or write each block when it is finished."""
    if mesh is not None and is_traced((params, calibration_tokens)):
        raise SpqrError("with a mesh, quantize cannot be traced: call it outside jax.jit, it compiles its parts itself")
    mesh = flat(mesh)
    params = unstack_blocks(params)
    block = model.new_block()
    check_weights(params, model, config)
    streams = None
    if calibration_tokens is not None:
        check_tokens(calibration_tokens, params[layer_name(0)], model)
        check_shares(len(jnp.asarray(calibration_tokens)), mesh)
        streams = start(embed(model, params, calibration_tokens), config)
    for index in range(model.config.num_layers):
        name = layer_name(index)
        finished, streams = quantize_block(block, name, params[name], streams, config, mesh=mesh)
        yield finished


def quantize_block(
    block: Block,
    name: str,
    params: Params,
    streams: Streams | None,
    config: SpqrConfig,
    allocate: Allocate = np.empty,
    mesh: Mesh | None = None,
) -> tuple[QuantizedBlock, Streams | None]:
    """Quantizes one block, and carries the hidden states of the calibration sequences to its output.

    Args:
      block: the block, see `Decoder.new_block`.
      name: its name in messages and reports.
      params: its parameters, dense.
      streams: hidden states before it, see `hidden_states.start`; None gives round-to-nearest.
      config: what to quantize to.
      allocate: `allocate(shape, dtype)` makes the arrays of hidden states.
      mesh: devices that share the work.

    Raises:
      SpqrError: hidden states or Hessians are not finite.

    Example:
      >>> streams = start(embed(model, params, tokens), config)
      >>> block, streams = quantize_block(model.new_block(), "layers_0", params["layers_0"], streams, config)
    """
    # Once here, not at each use.
    dense = jax.tree.map(partial(place, mesh=mesh), params)
    solved: dict[str, _Solved] = {}
    if streams is not None:
        streams, solved = _quantize_in_stages(block, dense, streams, config, name, allocate, mesh)
        _check_hidden(streams, name)
    else:
        for matrix in block.matrices():
            solved |= _solve((matrix,), dense, [], config, name, mesh)[0]
    kernels = {matrix: s.packed for matrix, s in solved.items()}
    report = {f"{name}.{matrix}": s.report for matrix, s in solved.items()}
    return QuantizedBlock(name, _with_kernels(params, kernels), report), streams


def check_weights(params: Params, model: Decoder, config: SpqrConfig) -> None:
    """Raises a SpqrError that names the first tensor that cannot be used, and why.

    Args:
      params: the parameter tree, or only some of the entries at its top.
      model: the Flax module.
      config: what to quantize to.
    """
    names = model.new_block().matrices()
    matrices = {f"{layer_name(index)}.{matrix}" for index in range(model.config.num_layers) for matrix in names}
    for path, leaf in flatten_dict(params, sep=".").items():
        name = path.removesuffix(".kernel")
        if isinstance(leaf, SpqrTensor | SplitTensor):
            raise SpqrError(f"{name} is quantized already; start from the original weights")
        if name in matrices:
            check_matrix(name, leaf.T, config)
        else:
            check_finite(name, leaf)


def check_tokens(calibration_tokens: Int[ArrayLike, "sequences tokens"], block: Params, model: Decoder) -> None:
    """Raises a SpqrError where calibration tokens are too few, too long or outside the vocabulary.

    Args:
      calibration_tokens: the tokens.
      block: parameters of one block; the sizes of its matrices say how many tokens are few.
      model: the Flax module.
    """
    tokens = jnp.asarray(calibration_tokens)
    if tokens.ndim != 2:
        raise SpqrError(f"calibration tokens must have shape [sequences, tokens], not {tokens.shape}")
    # A Hessian of n tokens has rank n at most; under an eighth of the features, damping is most of it.
    widest = max(block[matrix]["kernel"].shape[0] for matrix in model.new_block().matrices())
    if tokens.size * 8 < widest:
        raise SpqrError(
            f"{tokens.size} calibration tokens are too few for matrices with {widest} input features: "
            f"give at least {-(-widest // 8)}, better {widest} or more"
        )
    if tokens.shape[1] > model.config.max_positions:
        raise SpqrError(
            f"calibration sequences have {tokens.shape[1]} tokens, but the model takes {model.config.max_positions}"
        )
    if not is_traced(tokens):
        check_vocabulary(tokens, model.config.vocab_size)


class _Solved(NamedTuple):
    """One quantized matrix: packed, and reported."""

    packed: SpqrTensor
    report: MatrixReport


def place(leaf: Float[Any, "..."], mesh: Mesh | None) -> Float[Array, "..."]:
    """A parameter as the solver takes it; on a mesh, a kernel whose output features divide is cut along them."""
    if mesh is None:
        return jnp.asarray(leaf, jnp.float32)
    axis = 1 if leaf.ndim == 2 and leaf.shape[1] % mesh.size == 0 else None
    return put(leaf.astype(np.float32), along(mesh, axis))


def in_type(params: Params, block: Block, dtype: DTypeLike) -> Params:
    """A block's parameters with kernels of the type of the hidden states, once here, not for every batch."""
    return _with_kernels(params, {matrix: params[matrix]["kernel"].astype(dtype) for matrix in block.matrices()})


def _quantize_in_stages(
    block: Block,
    params: Params,
    streams: Streams,
    config: SpqrConfig,
    name: str,
    allocate: Allocate,
    mesh: Mesh | None,
) -> tuple[Streams, dict[str, _Solved]]:
    """Solves a block's matrices stage by stage and carries the streams to its output."""
    dtype = streams.quantized["hidden"].dtype
    original = in_type(params, block, dtype)
    solved: dict[str, _Solved] = {}
    kernels: dict[str, Array] = {}
    running, before = original, None if config.sequential else streams
    for number, stage in enumerate(block.stages):
        streams, moments = advance(block, number, running, original, streams, allocate, mesh)
        for feed, matrices in stage.feeds.items():
            found, weights = _solve(matrices, params, [moments.pop(feed)], config, name, mesh)
            solved |= found
            kernels |= {matrix: _as_kernel(weights.pop(matrix), dtype) for matrix in matrices}
        if config.sequential:
            running = _with_kernels(original, kernels)
    if before is not None:
        running = _with_kernels(original, kernels)
        streams = before
        for number in range(len(block.stages)):
            streams, _ = advance(block, number, running, original, streams, allocate, mesh)
    return streams, solved


def _solve(
    matrices: tuple[str, ...],
    params: Params,
    moments: list[InputMoments],
    config: SpqrConfig,
    block_name: str,
    mesh: Mesh | None,
) -> tuple[dict[str, _Solved], dict[str, Float[Array, "_ in"]]]:
    """Quantizes matrices that share an input, and reports on each; also returns the weights that they stand for.

    The moments of their input (none: round-to-nearest) may be many times as large as the matrices: they are taken out
    of the list, and freed as soon as they are used.
    """
    # JAX runs ahead of Python: what is still being computed is not the solver's time.
    jax.block_until_ready(moments)
    # Memory given back is slow to get again; without large matrices, it does not decide what a model needs.
    if moments and moments[0].hessian.size >= LARGE_HESSIAN:
        release_freed()
    started = time.perf_counter()
    kernels = tuple(params[matrix]["kernel"] for matrix in matrices)
    shrinkage = config.shrinkage * moments[0].chance if moments else 0.0
    weights = in_one_thread(_refit, kernels, moments[0] if moments else None, shrinkage, mesh)
    hessian = moments.pop().hessian if moments else None
    packed, dense, finite = quantize_shared(weights, hessian, config, mesh, shrinkage)
    errors = _relative_errors(weights, dense, hessian)
    seconds = float("nan")
    if not is_traced(finite):
        if not finite:
            raise SpqrError(
                f"{block_name}: the Hessian of the input of {', '.join(matrices)} cannot be factorized, not even with "
                f"{1000 * config.damping:g} of its mean diagonal added; look for NaNs or extreme values in the inputs"
            )
        if mesh is None:
            packed = tuple(trim(tensor) for tensor in packed)
        else:
            packed = tuple(_joined(tensor, len(weight)) for tensor, weight in zip(packed, weights, strict=True))
        seconds = time.perf_counter() - started
    total = sum(kernel.size for kernel in kernels)

    def report(tensor: SpqrTensor, error: Array) -> MatrixReport:
        share = tensor.shape[0] * tensor.shape[1] / total
        values: Any = bits_per_weight(tensor), outlier_share(tensor), error, seconds * share
        return MatrixReport._make(v if isinstance(v, jax.core.Tracer) else float(v) for v in values)

    solved = {
        matrix: _Solved(tensor, report(tensor, error))
        for matrix, tensor, error in zip(matrices, packed, errors, strict=True)
    }
    return solved, dict(zip(matrices, dense, strict=True))


def _joined(parts: SpqrTensor, out: int) -> SpqrTensor:
    """The matrix of which each device has packed its rows."""
    if parts.outliers is not None:
        # Not all the room for outliers is to leave the devices; powers of two, so that few programs are compiled.
        most = int(to_host(jnp.asarray(parts.outliers.offsets))[:, -1].max())
        parts = replace(parts, outliers=parts.outliers.crop(1 << max(most - 1, 0).bit_length()))
    return jax.device_put(join_rows(jax.tree.map(to_host, parts), out))


@partial(jax.jit, static_argnames="mesh")
def _refit(
    kernels: tuple[Float[Array, "in _"], ...],
    moments: InputMoments | None,
    shrinkage: Float[ArrayLike, ""],
    mesh: Mesh | None,
) -> tuple[Float[Array, "_ in"], ...]:
    """The weights to be quantized."""
    weights = tuple(kernel.T for kernel in kernels)
    if moments is None or moments.cross is None:
        return weights
    rows = weights, None if moments.lost is None else moments.lost.T
    inverse = ridge_inverse(moments.hessian, shrinkage)
    refitted = by_rows(refit, mesh, rows, moments.cross - moments.hessian, inverse, unit=BLOCK_ROWS)
    return tuple(r[: len(w)] for r, w in zip(refitted, weights, strict=True))


@partial(jax.jit, static_argnames="dtype")
def _as_kernel(weight: Float[Array, "out in"], dtype: DTypeLike) -> Float[Array, "in out"]:
    return weight.T.astype(dtype)


@jax.jit
def _relative_errors(
    weights: tuple[Float[Array, "_ in"], ...],
    dense: tuple[Float[Array, "_ in"], ...],
    hessian: Float[Array, "in in"] | None,
) -> tuple[Float[Array, ""], ...]:
    metric = jnp.eye(weights[0].shape[1]) if hessian is None else hessian
    return tuple(relative_error(w, d, metric) for w, d in zip(weights, dense, strict=True))


def _with_kernels(params: Params, kernels: dict[str, Any]) -> Params:
    """The block's parameters with some kernels replaced."""
    return params | {name: params[name] | {"kernel": kernel} for name, kernel in kernels.items()}


def _check_hidden(streams: Streams, name: str) -> None:
    for hidden in jax.tree.leaves(streams):
        if not is_traced(hidden) and not all(np.isfinite(sequence).all() for sequence in hidden):
            raise SpqrError(f"{name}: its output has values that are NaN or infinite on the calibration tokens")
