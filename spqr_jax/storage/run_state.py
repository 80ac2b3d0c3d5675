"""The state of an unfinished run after some of its blocks, as a directory."""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spqr_jax.storage.description import Entries
from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.json_files import read_json
from spqr_jax.storage.record import BlockReport, blocks_from_json, blocks_to_json

STATE = "state.json"


class RunState(NamedTuple):
    """All that a run needs to resume.

    Attributes:
      entries: name of each finished part of the checkpoint → its entries in `spqr.json`.
      blocks: a report per finished block.
      hidden: hidden states of the calibration sequences after the last finished block: of the quantized model and,
        where weights are refitted, of the original; empty for round-to-nearest.
    """

    entries: dict[str, Entries]
    blocks: list[BlockReport]
    hidden: list[Float[np.ndarray, "sequences tokens hidden"]]


def write_state(directory: Path, state: RunState) -> None:
    """Writes a state into an empty directory: `state.json`, and hidden states as they lie in memory."""
    content = {
        "entries": state.entries,
        "blocks": blocks_to_json(state.blocks),
        "hidden": [{"shape": array.shape, "dtype": array.dtype.name} for array in state.hidden],
    }
    (directory / STATE).write_text(json.dumps(content) + "\n", encoding="utf-8")
    for number, array in enumerate(state.hidden):
        # Not `tofile`, which does not say why it fails.
        (directory / f"hidden-{number}").write_bytes(np.ascontiguousarray(array).view(np.uint8).data)


def read_state(directory: Path, *, hidden_on_disk: bool) -> RunState:
    """Reads a state; hidden states are mapped into memory if they stay on the disk, otherwise copied.

    Raises:
      CheckpointError: a file is missing or too short.
    """
    content = read_json(directory / STATE)
    try:
        hidden: list[np.ndarray] = [
            np.memmap(directory / f"hidden-{number}", jnp.dtype(array["dtype"]), "r", shape=tuple(array["shape"]))
            for number, array in enumerate(content["hidden"])
        ]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} cannot be read: {error}; delete its run's directory to start anew"
        ) from error
    blocks = blocks_from_json(content["blocks"])
    return RunState(content["entries"], blocks, hidden if hidden_on_disk else [np.array(array) for array in hidden])
