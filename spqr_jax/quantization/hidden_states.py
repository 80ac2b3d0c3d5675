"""Hidden states of the calibration sequences: all in host memory, a few at a time on each device."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, PyTree

from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Block, Decoder, Params, make_context
from spqr_jax.quantization.expert_moments import ExpertMoments, complete_experts, expert_sums
from spqr_jax.quantization.moments import InputMoments, MomentSums, complete, moment_sums
from spqr_jax.quantization.refit import Drift, follows_original, residual_difference
from spqr_jax.runtime.placement import AXIS, ONE_DEVICE, Placement, to_host
from spqr_jax.runtime.tracing import is_traced

SEQUENCES_AT_ONCE = 2
"""Calibration sequences that go through a stage together on a device: few enough that activations stay in the cache."""


States = dict[str, Num[Array | np.ndarray, "sequences tokens ..."]]


class Streams(NamedTuple):
    """States of all calibration sequences, in the quantized and in the original model."""

    quantized: States
    original: States | None


def embed(
    model: Decoder,
    params: Params,
    tokens: Int[ArrayLike, "sequences tokens"],
    placement: Placement = ONE_DEVICE,
) -> Float[Array | np.ndarray, "sequences tokens hidden"]:
    """Input of the first block for all sequences; only `embed_tokens` of the parameters is used.

    Calibration of a float16 model runs in bfloat16: hidden states cannot overflow in it, and CPUs multiply it faster.
    """
    if model.dtype == jnp.float16:
        model = model.clone(dtype=jnp.bfloat16)
    params = {"embed_tokens": jax.tree.map(jnp.asarray, params["embed_tokens"])}

    def step(total: None, tokens: Any) -> tuple[None, Any]:
        return total, model.apply({"params": params}, tokens, method="embed")

    if is_traced((params, tokens)):
        return step(None, tokens)[1]
    return scan_batches(step, None, np.asarray(tokens), Placement(allocate=placement.allocate))[1]


def start(hidden: Float[Array | np.ndarray, "sequences tokens hidden"], config: SpqrConfig) -> Streams:
    """States before the first block; the original model's too where weights are refitted."""
    return Streams({"hidden": hidden}, {"hidden": hidden} if follows_original(config) else None)


def advance(
    block: Block,
    stage_index: int,
    running: Params,
    original: Params,
    streams: Streams,
    placement: Placement = ONE_DEVICE,
) -> tuple[Streams, dict[str, InputMoments | ExpertMoments]]:
    """Takes all sequences through one stage of a block, and sums the moments of the inputs that it makes.

    Args:
      block: the block.
      stage_index: index of the stage.
      running: parameters for the quantized model's states.
      original: parameters for the original model's.
      streams: the states before the stage; they are not changed.
      placement: devices that share the sequences, and memory for the states after the stage.

    Returns:
      The states after the stage, and for each entry of `Stage.feeds` its moments.
    """
    stage = block.stages[stage_index]
    total = {}
    for feed, names in stage.feeds.items():
        features, experts = original[names[0]]["kernel"].shape[-2], block.experts().get(names[0])
        rows = -(-_rows(features, experts) // placement.shares) * placement.shares

        def zeros(columns: int, rows: int = rows) -> Float[Array, "rows columns"]:
            return jnp.zeros((rows, columns), device=placement.along(0))

        drift = None
        if streams.original is not None and experts is None:
            hidden = streams.quantized["hidden"].shape[-1]
            drift = Drift(zeros(features), zeros(hidden) if feed == stage.restores else None)
        total[feed] = MomentSums(zeros(features), drift, zeros(1), None if experts is None else zeros(2))
    # Without the allocation: the cache of compiled programs would keep what it refers to alive.
    devices = Placement(placement.mesh)
    step = partial(_step, block, stage_index, devices, running, original)
    total, streams = scan_batches(step, total, streams, placement)
    sequences = len(streams.quantized["hidden"])
    return streams, {
        feed: _whole(devices, sequences, block.experts().get(stage.feeds[feed][0]), *sums)
        for feed, sums in total.items()
    }


def _rows(features: int, experts: int | None) -> int:
    """Rows of the sums of an input: its features, of each expert and of all together where there are any."""
    return features * (1 if experts is None else experts + 1)


def scan_batches(
    step: Callable[[Any, Any], tuple[Any, Any]],
    total: PyTree,
    arrays: PyTree,
    placement: Placement = ONE_DEVICE,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` of `step` over batches of a few sequences, with no more than one batch on the devices.

    Args:
      step: `(total, batch) -> (total, batch of results)`.
      total: the carry.
      arrays: in host memory, the sequences along their first axis; JAX scans over traced ones.
      placement: devices among which each batch is divided, and memory for the results.

    Returns:
      The last total, and the results of all batches.
    """
    sequences = len(jax.tree.leaves(arrays)[0])
    batch = math.gcd(sequences // placement.shares, SEQUENCES_AT_ONCE) * placement.shares
    if is_traced(arrays):
        batches = jax.tree.map(lambda a: a.reshape(-1, batch, *a.shape[1:]), arrays)
        total, results = jax.lax.scan(step, total, batches)
        return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)
    results = None
    for start in range(0, sequences, batch):
        part = slice(start, start + batch)
        total, after = step(total, jax.tree.map(lambda a, part=part: placement.put(a[part], 0), arrays))
        if results is None:
            results = jax.tree.map(lambda a: placement.allocate((sequences, *a.shape[1:]), a.dtype), after)
        jax.tree.map(lambda whole, a, part=part: np.copyto(whole[part], to_host(a)), results, after)
    return total, results


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _step(
    block: Block,
    stage_index: int,
    placement: Placement,
    running: Params,
    original: Params,
    total: dict[str, MomentSums],
    streams: Streams,
) -> tuple[dict[str, MomentSums], Streams]:
    """Takes a batch of sequences through one stage, and adds the moments of the inputs that it makes."""
    if placement.mesh is None:
        return _local_step(block, stage_index, jnp.add, running, original, total, streams)
    step = partial(_local_step, block, stage_index, _add_of_all_devices)
    own = P(AXIS)
    return jax.shard_map(step, mesh=placement.mesh, in_specs=(P(), P(), own, own), out_specs=own)(
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
    """`_step` for the sequences of one device; `add` adds its sums to the total."""
    stage = block.stages[stage_index]
    context, _ = make_context(jnp.ones(streams.quantized["hidden"].shape[:2], bool))

    def run(params: Params, state: States) -> Any:
        return block.apply({"params": params}, state, context, method=stage.method)

    state = run(running, streams.quantized)
    reference: Any = None if streams.original is None else run(original, streams.original)
    sums = {}
    for feed, names in stage.feeds.items():
        if stage.routed_by is not None:
            experts = block.experts()[names[0]]
            sums[feed] = expert_sums(state[feed], state[stage.routed_by], experts)
            continue
        drift, residual = total[feed].drift, None
        if drift is not None and drift.residual is not None:
            residual = residual_difference(reference["hidden"], state["hidden"])
            if stage.multiplier != 1.0:
                residual = residual / stage.multiplier
        sums[feed] = moment_sums(state[feed], reference and reference[feed], residual)
    return jax.tree.map(add, total, sums), Streams(state, reference)


def _add_of_all_devices(total: Float[Array, "rows _"], sums: Float[Array, "in _"]) -> Float[Array, "rows _"]:
    """Adds the sums of all devices to this device's rows of the total.

    One after the other, in the order of a single device. Another order would round differently and, sooner or later,
    give another order of features, and other codes.
    """
    rows, columns = total.shape
    devices = jax.lax.axis_size(AXIS)
    padded = jnp.pad(sums, ((0, devices * rows - len(sums)), (0, 0))).reshape(devices, rows, columns)
    return jax.lax.scan(lambda t, m: (t + m, None), total, jax.lax.all_to_all(padded, AXIS, 0, 0))[0]


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _whole(
    placement: Placement,
    sequences: int,
    experts: int | None,
    hessian: Float[Array, "rows in"],
    drift: Drift | None,
    correlations: Float[Array, "rows 1"],
    counts: Float[Array, "rows 2"] | None,
) -> InputMoments | ExpertMoments:
    """The moments over all sequences, whole on every device; the large sums are donated."""
    rows = _rows(hessian.shape[1], experts)
    sums = jax.tree.map(lambda m: m[:rows], MomentSums(hessian, drift, correlations, counts))
    sums = placement.gather(sums)
    return complete(sums, sequences) if experts is None else complete_experts(sums)
