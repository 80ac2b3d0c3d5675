"""The work of `spqr quantize --dry-run`: an estimate of a run, from two of its blocks.

The first two blocks are quantized by the real run's code, into a directory beside the destination that is deleted. The
first block also compiles; the second takes the time of each that follows. All blocks have the same shapes, so memory
does not grow after these two. One block is quantized before, because a run that follows finds the compiled programs in
JAX's persistent cache: for SmolLM2 the first block then takes 19 s instead of 60, on two busy cores.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import layer_name
from spqr_jax.quantization.hidden_states import SEQUENCES_AT_ONCE
from spqr_jax.quantization.refit import follows_original
from spqr_jax.runtime.memory import peak_bytes
from spqr_jax.storage.checkpoint import describe
from spqr_jax.storage.description import Entries
from spqr_jax.storage.destination import check_destination
from spqr_jax.storage.directories import bytes_on_disk, existing_parent
from spqr_jax.storage.disk_to_disk import quantize_checkpoint
from spqr_jax.storage.layout import PARAMS
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import BlockReport
from spqr_jax.storage.totals import summarize_described

MEASURED_BLOCKS = 2
"""One block that compiles, and one that does not."""

MEASURED_TOKENS = 16_384
"""Most calibration tokens of a measurement, as many as a run has by default; more are extrapolated."""


class Measurement(NamedTuple):
    """The measured seconds of the first blocks of a run.

    Attributes:
      seconds: of each block.
      solver_seconds: of the matrices in each block, which do not depend on the number of sequences.
      other_seconds: before and after the blocks.
      share: measured sequences / sequences of the run.
      source_share: source bytes of the measured parts / of all parts; the other seconds grow with them.
    """

    seconds: Sequence[float]
    solver_seconds: Sequence[float]
    other_seconds: float
    share: float
    source_share: float

    @property
    def block_seconds(self) -> float:
        """Seconds of a block of the run: solver + (block − solver) / share, of the last measured one."""
        return self.solver_seconds[-1] + (self.seconds[-1] - self.solver_seconds[-1]) / self.share

    def run_seconds(self, blocks: int) -> float:
        """Seconds of a run of so many blocks: what the first took more to compile, the blocks, and the rest.

        Example:
          >>> Measurement([5.0, 3.0], [2.0, 1.0], other_seconds=1.0, share=0.5, source_share=0.1).run_seconds(10)
          62.0
        """
        compiling = max(self.seconds[0] - self.seconds[-1], 0.0)
        return compiling + blocks * self.block_seconds + self.other_seconds / self.source_share


def estimate(
    source: ModelSource,
    destination: Path,
    tokens: Int[np.ndarray, "sequences length"] | None,
    config: SpqrConfig,
    *,
    mesh: Mesh | None,
    hidden_on_disk: bool,
    overwrite: bool,
    on_block: Callable[[BlockReport], None],
) -> dict[str, Any]:
    """Estimates a run of `quantize_checkpoint` on this machine; arguments are those of the run.

    Returns:
      blocks, seconds, seconds of a block, bytes of memory (the largest resident set of this process), of disk while it
      runs, and of the checkpoint, with the totals of `Summary.sizes`.

    Raises:
      SpqrError: as `quantize_checkpoint`.
    """
    destination = destination.resolve()
    check_destination(destination, overwrite=overwrite)
    blocks = source.model.config.num_layers
    few = _first_blocks(source, MEASURED_BLOCKS)
    part = None if tokens is None else tokens[: _measured_sequences(tokens, mesh)]
    with tempfile.TemporaryDirectory(prefix=f"{destination.name}.dry-run-", dir=existing_parent(destination)) as place:
        checkpoint = Path(place) / "measured"
        options: dict[str, Any] = {"config": config, "mesh": mesh, "hidden_on_disk": hidden_on_disk}
        smallest = Path(place) / "compiled"
        quantize_checkpoint(_first_blocks(source, 1), smallest, part, **options)
        jax.clear_caches()
        started = time.perf_counter()
        parts = quantize_checkpoint(few, checkpoint, part, on_block=on_block, **options)
        reports = parts[: few.model.config.num_layers]  # those behind are of embedding and head
        spent = time.perf_counter() - started
        size = _size_on_disk(smallest, checkpoint, len(reports), blocks)
        totals = summarize_described(_of_all_blocks(describe(checkpoint), len(reports), blocks))
    block_bytes, end_bytes = _source_bytes(few)
    measured = Measurement(
        seconds=[report.seconds for report in reports],
        solver_seconds=[sum(matrix.seconds for matrix in report.matrices.values()) for report in reports],
        other_seconds=spent - sum(report.seconds for report in reports),
        share=1.0 if tokens is None or part is None else len(part) / len(tokens),
        source_share=(end_bytes + len(reports) * block_bytes) / (end_bytes + blocks * block_bytes),
    )
    stored, held = (0, 0) if tokens is None else _bytes_of_states(few, tokens, config)
    return {
        "blocks": blocks,
        "seconds": measured.run_seconds(blocks),
        "seconds_per_block": measured.block_seconds,
        "memory_bytes": peak_bytes() + (0 if hidden_on_disk else round((1 - measured.share) * held)),
        "disk_bytes": size + 2 * stored,  # a state is deleted after the next one is complete
        **totals.sizes_with_files(size),
        "seconds_to_measure": spent,
    }


def _of_all_blocks(measured: Entries, count: int, blocks: int) -> Entries:
    """The entries of a checkpoint of so many blocks: further blocks have those of the `count` measured ones."""

    def repeated(entries: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(entries)
        for index in range(count, blocks):
            own, others = f"{layer_name(index % count)}.", f"{layer_name(index)}."
            found |= {others + name.removeprefix(own): entries[name] for name in entries if name.startswith(own)}
        return found

    return {
        "matrices": repeated(measured["matrices"]),
        "dense": repeated(measured["dense"]),
        "empty": repeated(measured["empty"]),
    }


def _size_on_disk(smallest: Path, measured: Path, count: int, blocks: int) -> int:
    """Bytes of a checkpoint of so many blocks, from those of one block and of `count`.

    A further block adds the mean of their arrays, and what the JSON files say of it.
    """
    arrays = [bytes_on_disk(measured / PARAMS / layer_name(index)) for index in range(count)]
    of_one, of_all = (bytes_on_disk(root) - bytes_on_disk(root / PARAMS) for root in (smallest, measured))
    return bytes_on_disk(measured) + (blocks - count) * round(np.mean(arrays) + (of_all - of_one) / max(count - 1, 1))


def _first_blocks(source: ModelSource, count: int) -> ModelSource:
    """The model of the first blocks alone."""
    count = min(count, source.model.config.num_layers)
    left_out = {layer_name(index) for index in range(count, source.model.config.num_layers)}
    config: Any = source.model.config
    model = source.model.clone(config=replace(config, num_layers=count))
    return source._replace(model=model, parts={n: part for n, part in source.parts.items() if n not in left_out})


def _measured_sequences(tokens: Int[np.ndarray, "sequences length"], mesh: Mesh | None) -> int:
    """Number of sequences to measure, which the devices and their batches share evenly as they share all."""
    together = SEQUENCES_AT_ONCE * (1 if mesh is None else mesh.size)
    most = max(MEASURED_TOKENS // tokens.shape[1], 1)
    return len(tokens) if len(tokens) <= max(most, together) else max(most // together, 1) * together


def _source_bytes(source: ModelSource) -> tuple[int, int]:
    """Bytes of a block of a source, and of the parts that are no blocks."""
    first = layer_name(0)
    ends = [name for name in source.parts if name not in map(layer_name, range(source.model.config.num_layers))]

    def size(name: str) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(source.parts[name]()))

    return size(first), sum(map(size, ends))


def _bytes_of_states(
    source: ModelSource, tokens: Int[np.ndarray, "sequences length"], config: SpqrConfig
) -> tuple[int, int]:
    """Bytes of all hidden states: as an unfinished run stores them, and the most that are in memory at once."""
    number = tokens.size * jnp.dtype(source.model.dtype).itemsize * (2 if follows_original(config) else 1)
    block = source.parts[layer_name(0)]()
    widest = max(block[matrix]["kernel"].shape[-2] for matrix in source.model.new_block().matrices())
    hidden = source.model.config.hidden_size
    # Before a stage, the hidden states; after it, these and the inputs of the next matrices.
    return number * hidden, number * (2 * hidden + widest)
