"""The directory of an unfinished run: the finished parts of its checkpoint, and the state to resume from.

Content of such a directory, `<destination>.partial`:

  * `run.json`: model, settings and calibration tokens of the run; only the same run can be resumed;
  * `checkpoint/`: the finished parts of the checkpoint, see `spqr_jax.storage.checkpoint`;
  * `state-<n>/`: the state after n blocks, see `spqr_jax.storage.run_state`. It gets its name when all its content, and
    the block before it, is on the disk. Then the earlier state is deleted;
  * `manifest.json`: the manifest of the complete checkpoint, just before the checkpoint gets its own name.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Shaped
from transformers import PreTrainedTokenizerFast

from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.storage.checkpoint import complete
from spqr_jax.storage.description import Entries
from spqr_jax.storage.directories import (
    existing_parent,
    new_directory,
    publish,
    remove_directory,
    remove_leftovers,
    synchronize,
    synchronize_all,
)
from spqr_jax.storage.errors import CheckpointError, reason
from spqr_jax.storage.json_files import read_json, write_json
from spqr_jax.storage.layout import MANIFEST, PARAMS
from spqr_jax.storage.model_card import Origin
from spqr_jax.storage.parts import write_part
from spqr_jax.storage.record import Record, write_record
from spqr_jax.storage.run_state import RunState, read_state, write_state

RUN = "run.json"


@dataclass(frozen=True)
class PartialRun:
    """The directory of an unfinished run. All methods that write raise a CheckpointError that says how to resume.

    Attributes:
      directory: its path.

    Example:
      >>> run = PartialRun.of(Path("small-spqr"))
      >>> with run.claim({"config": {"bits": 3}}):
      ...     run.finished_blocks
      0
    """

    directory: Path

    @classmethod
    def of(cls, destination: Path) -> "PartialRun":
        """The run that writes a checkpoint to `destination`."""
        return cls(destination.with_name(f"{destination.name}.partial"))

    @property
    def finished_blocks(self) -> int:
        """Number of blocks, and then of embedding and head, that need not be quantized again."""
        numbers = (path.name.removeprefix("state-") for path in self.directory.glob("state-*"))
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    @contextmanager
    def claim(self, description: Mapping[str, Any]) -> Iterator[None]:
        """Creates the directory, or checks that it holds the same run, and locks it against other processes.

        Args:
          description: model, settings and inputs of the run: nested dicts of values that JSON has.

        Raises:
          CheckpointError: the directory holds another run, whose first difference is named, or is locked.
        """
        import fcntl  # which Windows does not have

        if not self.directory.exists():
            with self._writing(), new_directory(self.directory) as incomplete:
                write_json(incomplete / RUN, description)
        self._check_same(description)
        with (self.directory / RUN).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.directory} is in use by another process: wait for that process or stop it"
                ) from None
            yield

    def resume(self, *, hidden_on_disk: bool) -> RunState:
        """Reads the last state; hidden states stay in their files, mapped into memory, if `hidden_on_disk`."""
        finished = self.finished_blocks
        if not finished:
            return RunState({}, [], [])
        return read_state(self._state(finished), hidden_on_disk=hidden_on_disk)

    def tidy(self, state: RunState) -> None:
        """Deletes what an interrupted run left beside its last state."""
        with self._writing():
            remove_leftovers(self.directory)
            self._keep_only(state)

    def write_part(self, name: str, part: Params) -> Entries:
        """Writes a part of the checkpoint and returns its entries; it counts as finished once a state names it."""
        with self._writing():
            entries = write_part(self._checkpoint, name, part)
            params = self._checkpoint / PARAMS
            synchronize_all(params / name)
            for path in (params, params.parent):
                synchronize(path)
            return entries

    def write_state(self, state: RunState) -> None:
        """Replaces the earlier state; the parts of the checkpoint that the new one names are written already."""
        with self._writing():
            with new_directory(self._state(len(state.blocks))) as incomplete:
                write_state(incomplete, state)
            self._keep_only(state)

    def finish(
        self,
        destination: Path,
        state: RunState,
        model: Decoder,
        tokenizer: PreTrainedTokenizerFast | None,
        record: Record,
    ) -> None:
        """Completes the checkpoint, publishes it at `destination` and deletes the run's directory."""
        with self._writing():
            write_record(self._checkpoint, record)
            complete(self._checkpoint, model, state.entries.values(), tokenizer, Origin(record.base_model, record))
            synchronize_all(self._checkpoint)
            shutil.copyfile(self._checkpoint / MANIFEST, self.directory / MANIFEST)
            synchronize(self.directory / MANIFEST)
            publish(self._checkpoint, destination)
            remove_directory(self.directory)

    def is_published(self, destination: Path) -> bool:
        """Whether the run was interrupted after its checkpoint got its name: no two runs write the same manifest."""
        manifests = self.directory / MANIFEST, destination / MANIFEST
        return all(path.is_file() for path in manifests) and len({path.read_bytes() for path in manifests}) == 1

    def delete(self) -> None:
        """Deletes the directory of a run whose checkpoint is published."""
        with self._writing():
            remove_directory(self.directory)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        """Maps an array in an unnamed file into memory; the file is deleted with the array."""
        with self._writing(), tempfile.TemporaryFile(dir=self.directory) as file:
            size = math.prod(shape) * dtype.itemsize
            file.truncate(size)
            # Reserve the space now: writing to a mapped file on a full disk would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=shape)

    @property
    def _checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    def _state(self, blocks: int) -> Path:
        return self.directory / f"state-{blocks}"

    def _keep_only(self, state: RunState) -> None:
        """Deletes other states, and parts of the checkpoint that this one does not name."""
        keep = {self._state(len(state.blocks)).name, *state.entries}
        for path in (*self.directory.glob("state-*"), *(self._checkpoint / PARAMS).glob("*")):
            if path.name not in keep:
                remove_directory(path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns an error in writing into a CheckpointError that says how to resume."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # on a full disk: OSError, from TensorStore ValueError, from tokenizers Exception
            free = shutil.disk_usage(existing_parent(self.directory)).free
            raise CheckpointError(
                f"{self.directory} could not be written: {reason(error)}; {free} bytes are free and "
                f"{self.finished_blocks} parts are finished: make room and repeat the command to resume after them"
            ) from error

    def _check_same(self, description: Mapping[str, Any]) -> None:
        path = self.directory / RUN
        if not path.is_file():
            raise CheckpointError(
                f"{self.directory} is not an unfinished run, because it has no {RUN}: choose another destination"
            )
        begun = flatten_dict(read_json(path), sep=".")
        asked = flatten_dict(json.loads(json.dumps(description)), sep=".")
        for key in (*asked, *begun):
            if begun.get(key) != asked.get(key):
                raise CheckpointError(
                    f"{self.directory} holds an unfinished run with {key} {begun.get(key)}, not {asked.get(key)}: give "
                    "the same configuration, source and calibration tokens to resume it, or delete it to start anew"
                )
