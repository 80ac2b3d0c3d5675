"""The directory of an unfinished run: which blocks are finished, and the hidden states that the next one needs.

What is in such a directory, `<destination>.partial`:

  * `run.json`: what is quantized, to what, with which calibration tokens; only the same run can be continued;
  * `checkpoint/`: the finished parts of the checkpoint, see `spqr_jax.storage.checkpoint`;
  * `state-<n>/`: what to go on with after n blocks: `state.json`, and hidden states as they lie in memory. It gets its
    name when all of it, and the block before it, is on the disk; then the state before it is deleted;
  * `manifest.json`: that of the complete checkpoint, just before the checkpoint gets its own name.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.storage.checkpoint import (
    MANIFEST,
    PARAMS,
    CheckpointError,
    Entries,
    read_json,
    reason,
    write_description,
    write_part,
)
from spqr_jax.storage.directories import (
    existing_parent,
    new_directory,
    publish,
    remove_directory,
    remove_leftovers,
    synchronize,
    synchronize_all,
)
from spqr_jax.storage.record import BlockReport, Record, blocks_from_json, blocks_to_json, write_record

RUN, CHECKPOINT, STATE = "run.json", "checkpoint", "state.json"


class State(NamedTuple):
    """What a run has to go on with.

    Attributes:
      entries: for each finished part of the checkpoint, what `spqr.json` will say of it.
      blocks: a report per finished block.
      hidden: hidden states of the calibration sequences after the last of them.
    """

    entries: dict[str, Entries]
    blocks: list[BlockReport]
    hidden: list[Float[np.ndarray, "sequences tokens hidden"]]


@contextmanager
def claim(directory: Path, description: Mapping[str, Any]) -> Iterator[None]:
    """Makes the directory of a run, or finds that it is one of the same run; meanwhile no other process may have it.

    Args:
      directory: where.
      description: what the run is to do; nested dicts of what JSON has.

    Raises:
      CheckpointError: another run has begun there, the first difference is named; or another process is at it.
    """
    import fcntl  # which Windows does not have

    if not directory.exists():
        with writing(directory), new_directory(directory) as incomplete:
            (incomplete / RUN).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    _check_same(directory, description)
    with (directory / RUN).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{directory} is in use by another process: wait for it, or stop it.") from None
        yield


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Says, of an error in writing, that the run can be continued."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # on a full disk: OSError, from TensorStore ValueError, from tokenizers plain Exception
        free = shutil.disk_usage(existing_parent(directory)).free
        raise CheckpointError(
            f"{directory} could not be written: {reason(error)}; {free} bytes are free. {count_finished(directory)} "
            "blocks are finished: make room, and the same command goes on after them."
        ) from error


def resume(directory: Path, *, hidden_on_disk: bool) -> State:
    """Finds out how far a run has come.

    Args:
      directory: where.
      hidden_on_disk: hidden states stay in their files, and are mapped into memory.
    """
    finished = count_finished(directory)
    return _read_state(directory / f"state-{finished}", hidden_on_disk) if finished else State({}, [], [])


def tidy(directory: Path, state: State) -> None:
    """Deletes what a run that was stopped has left beside its last state."""
    remove_leftovers(directory)
    _keep_only(directory, state)


def count_finished(directory: Path) -> int:
    """Number of the blocks that need not be quantized again."""
    numbers = (path.name.removeprefix("state-") for path in directory.glob("state-*"))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def keep_part(directory: Path, name: str, part: Params) -> Entries:
    """Writes a part of the checkpoint, and returns what `spqr.json` will say of it; it counts once a state names it."""
    entries = write_part(directory / CHECKPOINT, name, part)
    params = directory / CHECKPOINT / PARAMS
    synchronize_all(params / name)
    for path in (params, params.parent):
        synchronize(path)
    return entries


def record(directory: Path, state: State) -> None:
    """Writes a state in the place of the one before; the parts of the checkpoint that it names are written already."""
    content = {
        "entries": state.entries,
        "blocks": blocks_to_json(state.blocks),
        "hidden": [{"shape": array.shape, "dtype": array.dtype.name} for array in state.hidden],
    }
    name = f"state-{len(state.blocks)}"
    with new_directory(directory / name) as incomplete:
        (incomplete / STATE).write_text(json.dumps(content) + "\n", encoding="utf-8")
        for number, array in enumerate(state.hidden):
            # Not `tofile`, which does not say why it fails.
            (incomplete / f"hidden-{number}").write_bytes(np.ascontiguousarray(array).view(np.uint8).data)
    _keep_only(directory, state)


def finish(
    directory: Path, destination: Path, state: State, model: Decoder, tokenizer: Any, quantization: Record
) -> None:
    """Completes the checkpoint, gives it its name, in the place of what has it, and deletes the run's directory."""
    write_record(directory / CHECKPOINT, quantization)
    write_description(directory / CHECKPOINT, model, state.entries.values(), tokenizer)
    synchronize_all(directory / CHECKPOINT)
    shutil.copyfile(directory / CHECKPOINT / MANIFEST, directory / MANIFEST)
    synchronize(directory / MANIFEST)
    publish(directory / CHECKPOINT, destination)
    remove_directory(directory)


def is_published(directory: Path, destination: Path) -> bool:
    """Whether a run was stopped after its checkpoint got its name; no two runs write the same manifest."""
    manifests = directory / MANIFEST, destination / MANIFEST
    return all(path.is_file() for path in manifests) and len({path.read_bytes() for path in manifests}) == 1


def allocate_in_file(directory: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in a file without a name, mapped into memory; the file is gone with the array."""
    with writing(directory), tempfile.TemporaryFile(dir=directory) as file:
        size = math.prod(shape) * dtype.itemsize
        file.truncate(size)
        # Now, because a disk that is full when the array is written to would kill the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "r+", shape=shape)


def _keep_only(directory: Path, state: State) -> None:
    """Deletes other states, and parts of the checkpoint that this one does not name."""
    keep = {f"state-{len(state.blocks)}", *state.entries}
    for path in (*directory.glob("state-*"), *(directory / CHECKPOINT / PARAMS).glob("*")):
        if path.name not in keep:
            remove_directory(path)


def _read_state(path: Path, hidden_on_disk: bool) -> State:
    content = read_json(path / STATE)
    hidden: list[Any] = [
        np.memmap(path / f"hidden-{number}", jnp.dtype(array["dtype"]), "r", shape=tuple(array["shape"]))
        for number, array in enumerate(content["hidden"])
    ]
    blocks = blocks_from_json(content["blocks"])
    return State(content["entries"], blocks, hidden if hidden_on_disk else [np.array(array) for array in hidden])


def _check_same(directory: Path, description: Mapping[str, Any]) -> None:
    if not (directory / RUN).is_file():
        raise CheckpointError(f"{directory} is not an unfinished run: it has no {RUN}; choose another destination.")
    begun, asked = (
        flatten_dict(content, sep=".") for content in (read_json(directory / RUN), json.loads(json.dumps(description)))
    )
    for key in (*asked, *begun):
        if begun.get(key) != asked.get(key):
            raise CheckpointError(
                f"{directory} holds an unfinished run with {key} {begun.get(key)}, not {asked.get(key)}: give the same "
                "configuration, source and calibration tokens to continue it, or delete that directory to begin anew."
            )
