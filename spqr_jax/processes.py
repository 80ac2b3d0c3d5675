"""Several processes that run the same program on the devices of one mesh, under `jax.distributed`.

The first writes files and talks to people; all compute, and all must come to the same points of the program.
"""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30
"""A process that is silent for so long is taken for dead, and the others end."""


def join() -> None:
    """Joins the other processes; to be called before anything else of JAX.

    Who they are, JAX finds out by itself under SLURM, Open MPI, Kubernetes and on TPUs. Elsewhere the environment says
    it: JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ValueError: nothing says who they are.
    """
    numbers = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    given: Any = {name: int(number) for name, number in numbers.items() if number is not None}
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ValueError(
            f"the other processes are not known ({error}): start the command under SLURM or Open MPI, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def agree(what: str, value: Any) -> None:
    """Waits for all processes, and makes sure that they have the same value, of which `json` can make text.

    Raises:
      ValueError: one has another value than the first.
    """
    if jax.process_count() == 1:
        return
    own = json.dumps(value, sort_keys=True).encode()
    lengths = multihost_utils.process_allgather(np.array([len(own)])).reshape(-1)
    texts = multihost_utils.process_allgather(np.frombuffer(own.ljust(max(lengths)), np.uint8))
    for process, text in enumerate(texts):
        if not np.array_equal(text, texts[0]):
            raise ValueError(f"process {process} has {what} {_short(text)}, process 0 has {_short(texts[0])}")


def _short(text: np.ndarray) -> str:
    decoded = text.tobytes().decode().rstrip()
    return decoded if len(decoded) < 80 else f"{decoded[:76]} ..."
