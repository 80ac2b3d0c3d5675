"""Quantization from disk to disk, one block in memory at a time, in a run that can be interrupted and resumed."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from numpy.typing import ArrayLike

from spqr_jax.config import Rules, SpqrConfig
from spqr_jax.models.decoder import Params, layer_name
from spqr_jax.quantization.block import QuantizedBlock, quantize_block
from spqr_jax.quantization.checks import check_shares, check_tokens, check_weights
from spqr_jax.quantization.ends import quantize_end
from spqr_jax.quantization.hidden_states import Streams, embed, start
from spqr_jax.rules import Plan
from spqr_jax.runtime.placement import Placement
from spqr_jax.runtime.processes import agree, is_first
from spqr_jax.runtime.x64 import in_32_bits
from spqr_jax.storage.description import Entries, describe_model, joined_entries
from spqr_jax.storage.destination import check_destination
from spqr_jax.storage.digests import digest
from spqr_jax.storage.directories import existing_parent
from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.partial_run import PartialRun
from spqr_jax.storage.paths import resolved
from spqr_jax.storage.record import BlockReport, new_record
from spqr_jax.storage.run_state import RunState
from spqr_jax.storage.totals import summarize_described
from spqr_jax.texts import calibration_sequences


@dataclass(frozen=True)
class _Job:
    """The inputs of a run, and the placement of its work."""

    source: ModelSource
    tokens: Int[np.ndarray, "sequences tokens"] | None
    plan: Plan
    placement: Placement
    quality: Mapping[str, float] | None

    @property
    def blocks(self) -> list[str]:
        """Names of the decoder blocks, in order."""
        return [layer_name(index) for index in range(self.source.model.config.num_layers)]

    @property
    def ends(self) -> list[str]:
        """Names of the parts behind the blocks that are quantized: embedding and head, if they are."""
        return list(self.plan.ends(self.source.model))

    @property
    def kept(self) -> list[str]:
        """Names of the parts that stay as they are: the final norm, and embedding and head where they are dense."""
        return sorted(self.source.parts.keys() - {*self.blocks, *self.ends})


@in_32_bits
def quantize_checkpoint(
    source: ModelSource,
    destination: str | PathLike[str],
    calibration_tokens: ArrayLike | None,
    *,
    config: SpqrConfig,
    rules: Rules = (),
    mesh: Mesh | None = None,
    hidden_on_disk: bool = False,
    overwrite: bool = False,
    on_block: Callable[[BlockReport], None] | None = None,
    quality: Mapping[str, float] | None = None,
) -> list[BlockReport]:
    """Quantizes a model that may be larger than memory into a checkpoint, bit for bit the result of `quantize`.

    All values of the source are checked first. One block's weights, and the next block's, are in memory at a time.
    Finished blocks are kept in `<destination>.partial`: repeating an interrupted call resumes after them. Under
    `jax.distributed` all processes make the same call, on shared files, with a mesh of all devices; the first writes.

    Args:
      source: the model, see `converters.open_pretrained` and `open_checkpoint`.
      destination: directory of the checkpoint, see `load`.
      calibration_tokens: token ids `[sequences, tokens]`, or texts to be packed, see `quantize`; the source's tokenizer
        encodes strings. None gives round-to-nearest.
      config, rules: the settings, and their changes for some matrices, see `quantize`.
      mesh: devices that share the work, see `quantize`.
      hidden_on_disk: keep the hidden states of the calibration sequences in mapped files, not in memory.
      overwrite: replace an existing checkpoint, once the new one is complete.
      on_block: called with the report of each finished block.
      quality: measured values by their names, for the record and the model card.

    Returns:
      A report per block, those of interrupted calls included.

    Raises:
      CheckpointError: the destination is taken, its `.partial` holds another run, or writing failed.
      SpqrError: as for `quantize`.

    Example:
      >>> reports = quantize_checkpoint(source, "compact-spqr", calibration, config=COMPACT)
      >>> model, quantized, tokenizer = load("compact-spqr")
    """
    destination = resolved(destination)
    run = PartialRun.of(destination)
    placement = Placement(mesh, run.allocate) if hidden_on_disk else Placement(mesh)
    plan = Plan.of(config, rules).checked(source.model)
    job = _Job(source, _sequences(calibration_tokens, source), plan, placement, quality)
    published = run.is_published(destination)
    if not published:
        check_destination(destination, overwrite=overwrite)
    description = _survey(job, run.directory)
    agree(description)
    with run.claim(description) if is_first() else nullcontext():
        state = _resume(run, hidden_on_disk)
        for following in () if published else _states(job, run, state):
            state = following
            if on_block is not None:
                on_block(state.blocks[-1])
        _finish(job, run, destination, state, published)
        return state.blocks


def _sequences(calibration_tokens: ArrayLike | None, source: ModelSource) -> Int[np.ndarray, "..."] | None:
    if calibration_tokens is None:
        return None
    return np.asarray(calibration_sequences(calibration_tokens, source.model.config.max_positions, source.tokenizer))


def _survey(job: _Job, directory: Path) -> dict[str, Any]:
    """Reads and checks all inputs of a run, and returns the description that tells it from other runs."""
    digests, size = {}, 0
    model, tokens = job.source.model, job.tokens
    for name in (*job.blocks, *job.ends, *job.kept):
        part = job.source.parts[name]()
        check_weights({name: part}, model, job.plan)
        if name == job.blocks[0] and tokens is not None:
            check_tokens(tokens, part, model)
            check_shares(len(tokens), job.placement)
        digests[name] = digest(part)
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(part))
    _check_space(directory, size // 2)
    return {
        # As earlier versions, which had no such setting, describe their unfinished runs.
        "config": {n: v for n, v in dataclasses.asdict(job.plan.config).items() if n != "embedding_bits" or v},
        **({"rules": job.plan.rules} if job.plan.rules else {}),
        "model": describe_model(model),
        "calibration": None if tokens is None else {"shape": list(tokens.shape), "tokens": digest(tokens)},
        "source": dict(sorted(digests.items())),
    }


def _check_space(directory: Path, needed: int) -> None:
    """Raises a CheckpointError where a new run has too little space for a checkpoint of `needed` bytes."""
    parent = existing_parent(directory)
    free = shutil.disk_usage(parent).free
    if not directory.exists() and free < needed:
        raise CheckpointError(
            f"{parent} has {free:,} bytes free, but the quantized model takes up to {needed:,}: make room or choose "
            "another destination"
        )


def _resume(run: PartialRun, hidden_on_disk: bool) -> RunState:
    """Reads the state that all processes resume from."""
    agree({"directory": str(run.directory)})
    state = run.resume(hidden_on_disk=hidden_on_disk)
    if is_first():
        run.tidy(state)
    agree({"finished blocks": len(state.blocks)})
    return state


def _states(job: _Job, run: PartialRun, state: RunState) -> Iterator[RunState]:
    """Quantizes the unfinished blocks, and yields the state after each of them when it is on the disk."""
    # Stored states are leaves without names: any array shows which entries there are.
    streams = None if job.tokens is None else start(np.zeros((1, 1, 1), np.float32), job.plan.config)
    structure: Any = jax.tree.structure(streams)
    if not state.blocks:
        state = _start(job, run)
    started = time.perf_counter()
    for finished, streams in _quantized(job, len(state.blocks), jax.tree.unflatten(structure, state.hidden)):
        entries = dict(state.entries)
        if is_first():
            entries[finished.name] = run.write_part(finished.name, finished.params)
        now = time.perf_counter()
        report = BlockReport(len(state.blocks) + 1, now - started, finished.report)
        state = RunState(entries, [*state.blocks, report], jax.tree.leaves(streams))
        if is_first():
            run.write_state(state)
        started = now
        yield state


def _quantized(job: _Job, done: int, streams: Streams | None) -> Iterator[tuple[QuantizedBlock, Streams | None]]:
    """Yields each further part that is quantized, with the hidden states after it: blocks, then embedding and head.

    Args:
      job: the inputs.
      done: number of parts that are quantized already.
      streams: hidden states after them.
    """
    model, parts = job.source.model, job.source.parts
    for name, params in _read_ahead(parts, job.blocks[done:], job.placement):
        block = model.new_block(job.blocks.index(name))
        finished, streams = quantize_block(block, name, params, streams, job.plan, job.placement)
        yield finished, streams
    for name in job.ends[max(done - len(job.blocks), 0) :]:
        params = {part: parts[part]() for part in (name, "norm") if part in parts}
        yield quantize_end(model, name, params, streams, job.plan, job.placement), streams


def _start(job: _Job, run: PartialRun) -> RunState:
    """Writes the parts that stay as they are, and embeds the calibration tokens."""
    parts = job.source.parts
    kept: dict[str, Entries] = {name: run.write_part(name, parts[name]()) for name in job.kept} if is_first() else {}
    if job.tokens is None:
        return RunState(kept, [], [])
    hidden = embed(job.source.model, {"embed_tokens": parts["embed_tokens"]()}, job.tokens, job.placement)
    return RunState(kept, [], jax.tree.leaves(start(hidden, job.plan.config)))


def _finish(job: _Job, run: PartialRun, destination: Path, state: RunState, published: bool) -> None:
    """Publishes the checkpoint, unless an interrupted call did, and deletes the run; all processes wait for it."""
    if is_first() and published:
        run.delete()
    elif is_first():
        shape = None if job.tokens is None else job.tokens.shape
        record = new_record(
            job.plan,
            shape,
            state.blocks,
            job.placement.mesh,
            base_model=job.source.name,
            quality=job.quality,
            sizes=summarize_described(joined_entries(state.entries.values())).sizes(),
        )
        run.finish(destination, state, job.source.model, job.source.tokenizer, record)
    agree({"finished blocks": len(state.blocks)})


def _read_ahead(
    parts: Mapping[str, Callable[[], Params]], names: Sequence[str], placement: Placement
) -> Iterator[tuple[str, Params]]:
    """Yields the named parts in order; while the caller works on one, a thread reads the next."""
    with ThreadPoolExecutor(1) as pool:
        reading = [pool.submit(parts[name]) for name in names[:1]]
        for index, name in enumerate(names):
            # In the solver's type at once, so that no kernel is in memory in the source's type too.
            params = {module: _placed(arrays, placement) for module, arrays in reading.pop().result().items()}
            reading += [pool.submit(parts[following]) for following in names[index + 1 : index + 2]]
            yield name, params


def _placed(arrays: Params, placement: Placement) -> Params:
    return arrays | {"kernel": placement.put_parameter(arrays["kernel"])} if "kernel" in arrays else arrays
