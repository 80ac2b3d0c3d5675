"""Hidden states of the calibration sequences: all in host memory, a few at a time on each device."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from pallas_kernels.errors import SpqrError
from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Block, Decoder, Params, State, make_context
from spqr_jax.quantization.moments import InputMoments, MomentSums, complete, moment_sums
from spqr_jax.runtime.devices import AXIS, along, gather, put, shares, to_host

SEQUENCES_AT_ONCE = 2
"""Calibration sequences that go through a stage together on a device: so few that activations stay in the cache."""

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]


class Streams(NamedTuple):
    """States of all calibration sequences, `[sequences, tokens, ...]`, in the quantized and in the original model."""

    quantized: State
    original: State | None


def embed(
    model: Decoder, params: Params, tokens: Int[ArrayLike, "sequences tokens"], allocate: Allocate = np.empty
) -> Float[Any, "sequences tokens hidden"]:
    """Input of the first block for all sequences; of the parameters, only `embed_tokens` is used.

    A model in float16 is followed in bfloat16, which no hidden state overflows, and which CPUs multiply faster.
    """
    if model.dtype == jnp.float16:
        model = model.clone(dtype=jnp.bfloat16)
    params = {"embed_tokens": jax.tree.map(jnp.asarray, params["embed_tokens"])}

    def step(total: None, tokens: Any) -> tuple[None, Any]:
        return total, model.apply({"params": params}, tokens, method="embed")

    if is_traced((params, tokens)):
        return step(None, tokens)[1]
    return scan_batches(step, None, np.asarray(tokens), allocate)[1]


def start(hidden: Float[Any, "sequences tokens hidden"], config: SpqrConfig) -> Streams:
    """States before the first block; the original model is followed where weights are refitted."""
    # In one pass for the whole block, a later matrix would make up again for what an earlier one has made up for.
    return Streams({"hidden": hidden}, {"hidden": hidden} if config.refit and config.sequential else None)


def check_shares(sequences: int, mesh: Mesh | None) -> None:
    """Raises a SpqrError where the devices of a mesh cannot have equally many sequences."""
    if sequences % shares(mesh):
        raise SpqrError(
            f"{sequences} calibration sequences cannot be shared evenly by {shares(mesh)} devices: give a multiple of "
            f"{shares(mesh)}"
        )


def advance(
    block: Block,
    stage_index: int,
    running: Params,
    original: Params,
    streams: Streams,
    allocate: Allocate = np.empty,
    mesh: Mesh | None = None,
) -> tuple[Streams, dict[str, InputMoments]]:
    """Takes all sequences through one stage of a block, and sums the moments of the inputs that it makes.

    Args:
      block: the block.
      stage_index: which of its stages.
      running: parameters for the quantized model's states.
      original: parameters for the original model's.
      streams: the states before the stage; they stay as they are.
      allocate: makes the arrays for the states after it.
      mesh: devices that share the sequences.
    """
    stage = block.stages[stage_index]
    total = {}
    for feed, names in stage.feeds.items():
        features = original[names[0]]["kernel"].shape[0]
        rows = -(-features // shares(mesh)) * shares(mesh)

        def zeros(columns: int, rows: int = rows) -> Float[Array, "rows columns"]:
            return jnp.zeros((rows, columns), device=along(mesh, 0))

        cross = lost = None
        if streams.original is not None:
            cross = zeros(features)
            lost = zeros(streams.quantized["hidden"].shape[-1]) if feed == stage.restores else None
        total[feed] = MomentSums(zeros(features), cross, lost, zeros(1))
    step = partial(_step, block, stage_index, mesh, running, original)
    total, streams = scan_batches(step, total, streams, allocate, mesh)
    sequences = len(streams.quantized["hidden"])
    return streams, {
        feed: _whole(mesh, sequences, sums._replace(correlations=None), sums.correlations)
        for feed, sums in total.items()
    }


def scan_batches(
    step: Callable[[Any, Any], tuple[Any, Any]],
    total: PyTree,
    arrays: PyTree,
    allocate: Allocate = np.empty,
    mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree]:
    """Like `jax.lax.scan` of `step` over batches of a few sequences, but no more than one batch is on the devices.

    Args:
      step: `(total, batch) -> (total, batch of results)`.
      total: what goes from step to step.
      arrays: in host memory, the sequences along their first axis; traced ones are scanned over by JAX.
      allocate: `allocate(shape, dtype)` makes the arrays of the results.
      mesh: devices among which each batch is divided.

    Returns:
      The last total, and the results of all batches.
    """
    sequences = len(jax.tree.leaves(arrays)[0])
    batch = math.gcd(sequences // shares(mesh), SEQUENCES_AT_ONCE) * shares(mesh)
    if is_traced(arrays):
        batches = jax.tree.map(lambda a: a.reshape(-1, batch, *a.shape[1:]), arrays)
        total, results = jax.lax.scan(step, total, batches)
        return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)
    results = None
    for start in range(0, sequences, batch):
        part = slice(start, start + batch)
        total, after = step(total, jax.tree.map(lambda a, part=part: put(a[part], along(mesh, 0)), arrays))
        if results is None:
            results = jax.tree.map(lambda a: allocate((sequences, *a.shape[1:]), a.dtype), after)
        jax.tree.map(lambda whole, a, part=part: np.copyto(whole[part], to_host(a)), results, after)
    return total, results


def is_traced(tree: PyTree) -> bool:
    """Whether an array of a tree is known to JAX only by its shape."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _step(
    block: Block,
    stage_index: int,
    mesh: Mesh | None,
    running: Params,
    original: Params,
    total: dict[str, MomentSums],
    streams: Streams,
) -> tuple[dict[str, MomentSums], Streams]:
    """Takes a batch of sequences through one stage, and adds the moments of the inputs that it makes."""
    if mesh is None:
        return _local_step(block, stage_index, jnp.add, running, original, total, streams)
    step = partial(_local_step, block, stage_index, _add_of_all_devices)
    own = P(AXIS)
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), own, own), out_specs=own)(
        running, original, total, streams
    )


def _local_step(
    block: Block,
    stage_index: int,
    add: Callable[[Array, Array], Array],
    running: Params,
    original: Params,
    total: dict[str, MomentSums],
    streams: Streams,
) -> tuple[dict[str, MomentSums], Streams]:
    """The same with the sequences of one device."""
    stage = block.stages[stage_index]
    context, _ = make_context(jnp.ones(streams.quantized["hidden"].shape[:2], bool))

    def run(params: Params, state: State) -> Any:
        return block.apply({"params": params}, state, context, method=stage.method)

    state = run(running, streams.quantized)
    reference: Any = None if streams.original is None else run(original, streams.original)
    sums = {}
    for feed in stage.feeds:
        lost = None if total[feed].lost is None else _lost(reference["hidden"], state["hidden"])
        sums[feed] = moment_sums(state[feed], reference and reference[feed], lost)
    return jax.tree.map(add, total, sums), Streams(state, reference)


def _lost(
    original: Float[Array, "batch tokens hidden"], quantized: Float[Array, "batch tokens hidden"]
) -> Float[Array, "batch tokens hidden"]:
    """h₀ − h, of the same type, but rounded only once."""
    return (original.astype(jnp.float32) - quantized.astype(jnp.float32)).astype(original.dtype)


def _add_of_all_devices(total: Float[Array, "rows _"], sums: Float[Array, "in _"]) -> Float[Array, "rows _"]:
    """Adds what all devices have summed over their sequences to the rows of the total that are this device's.

    One after the other, in the order in which a single device adds them: another order would round otherwise, and
    sooner or later that gives another order of features, and other codes.
    """
    rows, columns = total.shape
    devices = jax.lax.axis_size(AXIS)
    padded = jnp.pad(sums, ((0, devices * rows - len(sums)), (0, 0))).reshape(devices, rows, columns)
    return jax.lax.scan(lambda t, m: (t + m, None), total, jax.lax.all_to_all(padded, AXIS, 0, 0))[0]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _whole(
    mesh: Mesh | None,
    sequences: int,
    large: MomentSums,
    correlations: Float[Array, "rows 1"],
) -> InputMoments:
    """The moments over all sequences; every device gets all of them. All sums but the small one are donated."""
    sums = large._replace(correlations=correlations)
    features = sums.hessian.shape[1]
    return complete(gather(jax.tree.map(lambda m: m[:features], sums), mesh), sequences)
