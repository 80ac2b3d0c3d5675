"""Quantizing from disk to disk: one block's weights in memory at a time, in a run that can be stopped and continued."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Int

from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Params, layer_name
from spqr_jax.quantization.block import quantize_block
from spqr_jax.quantization.checks import check_shares, check_tokens, check_weights
from spqr_jax.quantization.hidden_states import embed, start
from spqr_jax.runtime.placement import Placement
from spqr_jax.runtime.processes import agree, is_first
from spqr_jax.storage.checkpoint import CheckpointError, Entries, check_destination, describe_model
from spqr_jax.storage.directories import existing_parent, remove_directory
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.partial_run import (
    State,
    allocate_in_file,
    claim,
    finish,
    is_published,
    keep_part,
    record,
    resume,
    tidy,
    writing,
)
from spqr_jax.storage.record import BlockReport, new_record


def quantize_checkpoint(
    source: ModelSource,
    destination: str | PathLike[str],
    calibration_tokens: Int[ArrayLike, "sequences tokens"] | None,
    *,
    config: SpqrConfig,
    mesh: Mesh | None = None,
    hidden_on_disk: bool = False,
    overwrite: bool = False,
    on_block: Callable[[BlockReport], None] | None = None,
) -> list[BlockReport]:
    """Quantizes a model that may be larger than the memory, into a checkpoint with the bits that `quantize` gives.

    One block's weights are in memory at a time, beside those of the next, which is read meanwhile. All values of the
    source are read and checked first, so that a bad one shows at once.

    What is finished is kept in `<destination>.partial`. The same call, after whatever stopped it, goes on with the
    first block that is not finished.

    Under `jax.distributed` all processes make the same call, on files that all of them see, with a mesh of all their
    devices. Each keeps the hidden states of all sequences; the first writes.

    Args:
      source: the model, see `converters.open_pretrained` and `open_checkpoint`.
      destination: directory of the checkpoint, see `load`.
      calibration_tokens: token ids of sequences of equal length; None gives round-to-nearest.
      config: what to quantize to.
      mesh: devices that share the work, see `quantize`.
      hidden_on_disk: keep the hidden states of the calibration sequences in mapped files, not in memory.
      overwrite: replace a checkpoint that is there, once the new one is complete.
      on_block: called with the report of each block when it is finished.

    Returns:
      A report per block, those of earlier calls included.

    Raises:
      CheckpointError: the destination is taken; its `.partial` holds a run with another configuration, source or
        calibration, the difference of which is named; or writing failed, as on a full disk.
      SpqrError: as for `quantize`.

    Example:
      >>> source = open_pretrained("HuggingFaceTB/SmolLM2-135M")
      >>> calibration = random_windows(source.tokenizer.encode(wikitext2("valid")), sequences=32, length=512)
      >>> quantize_checkpoint(source, "smollm2-spqr", calibration, config=COMPACT)
      >>> model, params, tokenizer = load("smollm2-spqr")
    """
    placement = Placement(mesh)
    destination = Path(destination).resolve()
    directory = destination.with_name(f"{destination.name}.partial")
    published = is_published(directory, destination)
    if not published:
        check_destination(destination, overwrite=overwrite)
    tokens = None if calibration_tokens is None else np.asarray(calibration_tokens)
    description = _survey(source, tokens, config, placement, directory)
    agree(description)
    with claim(directory, description) if is_first() else nullcontext():
        agree({"directory": str(directory)})
        with writing(directory):
            state = resume(directory, hidden_on_disk=hidden_on_disk)
            if is_first():
                tidy(directory, state)
        agree({"finished blocks": len(state.blocks)})
        if hidden_on_disk:
            placement = Placement(mesh, partial(allocate_in_file, directory))
        for following in () if published else _states(source, tokens, config, placement, directory, state):
            state = following
            if on_block is not None:
                on_block(state.blocks[-1])
        if is_first():
            with writing(directory):
                if published:
                    remove_directory(directory)
                else:
                    shape = None if tokens is None else tokens.shape
                    quantization = new_record(config, shape, state.blocks, placement.mesh)
                    finish(directory, destination, state, source.model, source.tokenizer, quantization)
        agree({"finished blocks": len(state.blocks)})
        return state.blocks


def _survey(
    source: ModelSource,
    tokens: Int[np.ndarray, "sequences tokens"] | None,
    config: SpqrConfig,
    placement: Placement,
    directory: Path,
) -> dict[str, Any]:
    """Reads and checks all that goes into a run, part by part, and says what tells it from another."""
    digests, size = {}, 0
    blocks = _blocks(source)
    for name in (*blocks, *(source.parts.keys() - set(blocks))):
        part = source.parts[name]()
        check_weights({name: part}, source.model, config)
        if name == blocks[0] and tokens is not None:
            check_tokens(tokens, part, source.model)
            check_shares(len(tokens), placement)
        digests[name] = digest(part)
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(part))
    parent = existing_parent(directory)
    free = shutil.disk_usage(parent).free
    if not directory.exists() and free < size // 2:
        raise CheckpointError(f"{parent} has {free:,} bytes free, but the quantized model takes up to {size // 2:,}.")
    return {
        "config": dataclasses.asdict(config),
        "model": describe_model(source.model),
        "calibration": None if tokens is None else {"shape": list(tokens.shape), "tokens": digest(tokens)},
        "source": dict(sorted(digests.items())),
    }


def digest(tree: Any) -> str:
    """Checksum of names, types, shapes and values of arrays."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return f"BLAKE2b {digest.hexdigest()}"


def _states(
    source: ModelSource,
    tokens: Int[np.ndarray, "sequences tokens"] | None,
    config: SpqrConfig,
    placement: Placement,
    directory: Path,
    state: State,
) -> Iterator[State]:
    """Quantizes the blocks that are not finished; a state after each of them, when it is on the disk."""
    blocks = _blocks(source)
    structure: Any = jax.tree.structure(None if tokens is None else start(tokens, config))
    if not state.blocks:
        state = _start(source, tokens, config, placement, directory)
    started = time.perf_counter()
    for name, params in _read_ahead(source.parts, blocks[len(state.blocks) :], placement):
        streams = jax.tree.unflatten(structure, state.hidden)
        block, streams = quantize_block(source.model.new_block(), name, params, streams, config, placement)
        entries = dict(state.entries)
        with writing(directory):
            if is_first():
                entries[name] = keep_part(directory, name, block.params)
            now = time.perf_counter()
            report = BlockReport(len(state.blocks) + 1, now - started, block.report)
            state = State(entries, [*state.blocks, report], jax.tree.leaves(streams))
            if is_first():
                record(directory, state)
        started = now
        yield state


def _start(
    source: ModelSource,
    tokens: Int[np.ndarray, "sequences tokens"] | None,
    config: SpqrConfig,
    placement: Placement,
    directory: Path,
) -> State:
    """Writes what stays as it is, and embeds the calibration tokens."""
    ends: dict[str, Entries] = {}
    for name in source.parts.keys() - set(_blocks(source)) if is_first() else ():
        with writing(directory):
            ends[name] = keep_part(directory, name, source.parts[name]())
    if tokens is None:
        return State(ends, [], [])
    hidden = embed(source.model, {"embed_tokens": source.parts["embed_tokens"]()}, tokens, placement)
    return State(ends, [], jax.tree.leaves(start(hidden, config)))


def _blocks(source: ModelSource) -> list[str]:
    return [layer_name(index) for index in range(source.model.config.num_layers)]


def _read_ahead(
    parts: Mapping[str, Callable[[], Params]], names: Sequence[str], placement: Placement
) -> Iterator[tuple[str, Params]]:
    """The named parts in order; while the caller works on one, a thread reads the next."""
    with ThreadPoolExecutor(1) as pool:
        reading = [pool.submit(parts[name]) for name in names[:1]]
        for index, name in enumerate(names):
            # As the solver takes them: a kernel in the source's type is not needed any more.
            params = {module: _placed(arrays, placement) for module, arrays in reading.pop().result().items()}
            reading += [pool.submit(parts[following]) for following in names[index + 1 : index + 2]]
            yield name, params


def _placed(arrays: Params, placement: Placement) -> Params:
    return arrays | {"kernel": placement.put_parameter(arrays["kernel"])} if "kernel" in arrays else arrays
