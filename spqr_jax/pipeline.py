"""A whole model: its blocks in order and, inside a block, its stages; each matrix solved for the inputs it will get.

Source: Dettmers et al. 2023 (arXiv 2306.03078), section 4; the order inside a block is the official code's
`--true-sequential`. Here it costs one forward pass per block, because a stage stops where its matrices are needed.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import SpqrTensor, bits_per_weight, outlier_share, trim
from spqr_jax.config import SpqrConfig
from spqr_jax.hessian import InputMoments, complete, input_moments, refit, relative_error
from spqr_jax.models.decoder import Block, Decoder, Params, State, layer_name, make_context
from spqr_jax.models.stacking import unstack_blocks
from spqr_jax.solver import check_finite, check_matrix, quantize_shared
from spqr_jax.vocabulary import check_vocabulary

SEQUENCES_AT_ONCE = 2
"""Calibration sequences that go through a stage together."""


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


class Streams(NamedTuple):
    """States of all calibration sequences, `[sequences, tokens, ...]`, in the quantized and in the original model."""

    quantized: State
    original: State | None


def quantize(
    params: Params, calibration_tokens: Int[ArrayLike, "sequences tokens"] | None, *, model: Decoder, config: SpqrConfig
) -> tuple[Params, dict[str, MatrixReport]]:
    """Quantizes every matrix of the decoder blocks; embedding, norms, biases and head stay as they are.

    A pure function of its arrays. Under `jax.jit` (sensible for small models: all blocks are compiled) the outlier
    arrays keep room for every weight, and `pallas_kernels.trim` cuts them afterwards.

    Args:
      params: parameter tree of `model`, dense.
      calibration_tokens: token ids of sequences of equal length; None gives round-to-nearest.
      model: the Flax module.
      config: what to quantize to.

    Returns:
      The tree with an `SpqrTensor` in the place of each quantized kernel, and a report per matrix.

    Raises:
      ValueError: sizes that do not fit the format, values that are not finite, token ids outside the vocabulary, too
        few tokens; the message names the tensor and the numbers.

    Example:
      >>> quantized, report = quantize(params, tokens, model=model, config=COMPACT)
      >>> logits = model.apply({"params": quantized}, prompt)
    """
    quantized = dict(unstack_blocks(params))
    report: dict[str, MatrixReport] = {}
    for block in quantize_blocks(params, calibration_tokens, model=model, config=config):
        quantized[block.name] = block.params
        report |= block.report
    return quantized, report


def quantize_blocks(
    params: Params, calibration_tokens: Int[ArrayLike, "sequences tokens"] | None, *, model: Decoder, config: SpqrConfig
) -> Iterator[QuantizedBlock]:
    """The same, block by block, for callers that show progress or write each block when it is finished."""
    params = unstack_blocks(params)
    block = model.new_block()
    check_weights(params, model, config)
    streams: tuple[Streams, ...] = ()
    if calibration_tokens is not None:
        tokens = jnp.asarray(calibration_tokens)
        check_tokens(tokens, params, model)
        hidden: Any = model.apply({"params": params}, tokens, method="embed")
        streams = _split(hidden, config)
    for index in range(model.config.num_layers):
        name = layer_name(index)
        # Once here, not at each use.
        dense = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params[name])
        if not streams:
            solved: dict[str, _Solved] = {}
            for matrix in block.matrices():
                solved |= _solve((matrix,), dense, (), config, name)
        else:
            streams, solved = _quantize_block(block, dense, streams, config, name)
            _check_hidden(streams, name)
        yield QuantizedBlock(
            name,
            _with_kernels(params[name], {matrix: s.packed for matrix, s in solved.items()}),
            {f"{name}.{matrix}": s.report for matrix, s in solved.items()},
        )


def check_weights(params: Params, model: Decoder, config: SpqrConfig) -> None:
    """Raises a ValueError that names the first tensor that cannot be used, and why."""
    names = model.new_block().matrices()
    matrices = {f"{layer_name(index)}.{matrix}" for index in range(model.config.num_layers) for matrix in names}
    for path, leaf in flatten_dict(params, sep=".").items():
        name = path.removesuffix(".kernel")
        if isinstance(leaf, SpqrTensor):
            raise ValueError(f"{name} is quantized already; start from the original weights")
        if name in matrices:
            check_matrix(name, leaf.T, config)
        else:
            check_finite(name, leaf)


def check_tokens(tokens: Int[Array, "sequences tokens"], params: Params, model: Decoder) -> None:
    """Raises a ValueError where calibration tokens are too few, too long or outside the vocabulary."""
    if tokens.ndim != 2:
        raise ValueError(f"calibration tokens must have shape [sequences, tokens], not {tokens.shape}")
    # A Hessian of n tokens has rank n at most; under an eighth of the features, damping is most of it.
    widest = max(params[layer_name(0)][matrix]["kernel"].shape[0] for matrix in model.new_block().matrices())
    if tokens.size * 8 < widest:
        raise ValueError(
            f"{tokens.size} calibration tokens are too few for matrices with {widest} input features: "
            f"give at least {-(-widest // 8)}, better {widest} or more"
        )
    if tokens.shape[1] > model.config.max_positions:
        raise ValueError(
            f"calibration sequences have {tokens.shape[1]} tokens, but the model takes {model.config.max_positions}"
        )
    if not isinstance(tokens, jax.core.Tracer):
        check_vocabulary(tokens, model.config.vocab_size)


class _Solved(NamedTuple):
    """One quantized matrix: packed, as a dense kernel, and reported."""

    packed: SpqrTensor
    kernel: Float[Array, "in out"]
    report: MatrixReport


def _split(hidden: Float[Array, "sequences tokens hidden"], config: SpqrConfig) -> tuple[Streams, ...]:
    """The sequences with which the original model is followed, for the refit, and those without.

    Half of the sequences say nearly as well as all where inputs drifted to, and following them costs as much again.
    """
    # In one pass for the whole block, a later matrix would make up again for what an earlier one has made up for.
    if not (config.refit and config.sequential):
        return (Streams({"hidden": hidden}, None),)
    half = -(-len(hidden) // 2)
    paired = Streams({"hidden": hidden[:half]}, {"hidden": hidden[:half]})
    return (paired, Streams({"hidden": hidden[half:]}, None)) if len(hidden) > half else (paired,)


def _quantize_block(
    block: Block, params: Params, streams: tuple[Streams, ...], config: SpqrConfig, name: str
) -> tuple[tuple[Streams, ...], dict[str, _Solved]]:
    """Solves a block's matrices stage by stage and carries all streams to its output."""

    def advance(streams: tuple[Streams, ...], number: int, running: Params) -> tuple[Any, ...]:
        return tuple(zip(*(_advance(block, number, running, params, part) for part in streams), strict=True))

    solved: dict[str, _Solved] = {}
    running, before = params, () if config.sequential else streams
    for number, stage in enumerate(block.stages):
        streams, moments = advance(streams, number, running)
        for feed, matrices in stage.feeds.items():
            solved |= _solve(matrices, params, tuple(part[feed] for part in moments), config, name)
        if config.sequential:
            running = _with_kernels(params, {matrix: s.kernel for matrix, s in solved.items()})
    if not config.sequential:
        running = _with_kernels(params, {matrix: s.kernel for matrix, s in solved.items()})
        streams = before
        for number in range(len(block.stages)):
            streams, _ = advance(streams, number, running)
    return streams, solved


@partial(jax.jit, static_argnames=("block", "stage_index"))
def _advance(
    block: Block, stage_index: int, running: Params, original: Params, streams: Streams
) -> tuple[Streams, dict[str, InputMoments]]:
    """Takes all sequences through one stage, and sums the moments of the inputs that it makes.

    A few sequences at a time, so that activations stay in the cache.
    """
    stage = block.stages[stage_index]
    sequences, tokens = streams.quantized["hidden"].shape[:2]
    batch = math.gcd(sequences, SEQUENCES_AT_ONCE)
    context, _ = make_context(jnp.ones((batch, tokens), bool))

    def run(params: Params, state: State) -> Any:
        return block.apply({"params": params}, state, context, method=stage.method)

    def step(total: Any, streams: Streams) -> tuple[Any, Streams]:
        state = run(running, streams.quantized)
        reference = None if streams.original is None else run(original, streams.original)
        moments = {feed: input_moments(state[feed], reference and reference[feed]) for feed in stage.feeds}
        return jax.tree.map(jnp.add, total, moments), Streams(state, reference)

    batches = jax.tree.map(lambda a: a.reshape(-1, batch, *a.shape[1:]), streams)
    shapes = jax.eval_shape(run, running, jax.tree.map(lambda a: a[0], batches.quantized))
    zero = {feed: jnp.zeros((shapes[feed].shape[-1],) * 2) for feed in stage.feeds}
    total = {feed: InputMoments(z, None if streams.original is None else z) for feed, z in zero.items()}
    total, batches = jax.lax.scan(step, total, batches)
    after = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batches)
    return after, {feed: complete(moments) for feed, moments in total.items()}


def _solve(
    matrices: tuple[str, ...], params: Params, moments: tuple[InputMoments, ...], config: SpqrConfig, block_name: str
) -> dict[str, _Solved]:
    """Quantizes matrices that share an input, and reports on each."""
    # JAX runs ahead of Python: what is still being computed is not the solver's time.
    jax.block_until_ready(moments)
    started = time.perf_counter()
    kernels = tuple(params[matrix]["kernel"] for matrix in matrices)
    packed, dense, errors, finite = _solve_arrays(kernels, moments, config)
    seconds = float("nan")
    if not isinstance(finite, jax.core.Tracer):
        if not finite:
            raise ValueError(
                f"{block_name}: the Hessian of the input of {', '.join(matrices)} cannot be factorized, not even with "
                f"{1000 * config.damping:g} of its mean diagonal added; look for NaNs or extreme values in the inputs"
            )
        packed = tuple(trim(tensor) for tensor in packed)
        seconds = time.perf_counter() - started
    total = sum(kernel.size for kernel in kernels)

    def report(tensor: SpqrTensor, error: Array) -> MatrixReport:
        share = tensor.shape[0] * tensor.shape[1] / total
        values: Any = bits_per_weight(tensor), outlier_share(tensor), error, seconds * share
        return MatrixReport._make(v if isinstance(v, jax.core.Tracer) else float(v) for v in values)

    return {
        matrix: _Solved(tensor, kernel, report(tensor, error))
        for matrix, tensor, kernel, error in zip(matrices, packed, dense, errors, strict=True)
    }


@partial(jax.jit, static_argnames="config")
def _solve_arrays(
    kernels: tuple[Float[Array, "in _"], ...], moments: tuple[InputMoments, ...], config: SpqrConfig
) -> tuple[tuple[SpqrTensor, ...], tuple[Float[Array, "in _"], ...], tuple[Array, ...], Bool[Array, ""]]:
    """Refits, quantizes and compares matrices, given the moments of their input over each part of the sequences."""
    weights = tuple(kernel.T for kernel in kernels)
    hessian: Any = sum(part.hessian for part in moments) if moments else None
    if moments:
        weights = refit(weights, moments[0])
    packed, dense, finite = quantize_shared(weights, hessian, config)
    metric = jnp.eye(len(kernels[0])) if hessian is None else hessian
    errors = tuple(relative_error(w, d, metric) for w, d in zip(weights, dense, strict=True))
    return packed, tuple(d.T for d in dense), errors, finite


def _with_kernels(params: Params, kernels: dict[str, Any]) -> Params:
    """The block's parameters with some kernels replaced."""
    return params | {name: params[name] | {"kernel": kernel} for name, kernel in kernels.items()}


def _check_hidden(streams: tuple[Streams, ...], name: str) -> None:
    for hidden in jax.tree.leaves(streams):
        if not isinstance(hidden, jax.core.Tracer) and not bool(jnp.isfinite(hidden).all()):
            raise ValueError(f"{name}: its output has values that are NaN or infinite on the calibration tokens")
