"""Several processes that run the same program on the devices of one mesh, under `jax.distributed`.

The first writes files and talks to people; all compute, and all must come to the same points of the program.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from pallas_kernels.errors import SpqrError

HEARTBEAT_SECONDS = 30
"""A process that is silent for so long is taken for dead, and the others end."""


def join() -> None:
    """Joins the other processes; to be called before anything else of JAX.

    Who they are, JAX finds out by itself under SLURM, Open MPI, Kubernetes and on TPUs. Elsewhere the environment says
    it: JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      SpqrError: nothing says who they are.
    """
    numbers = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        given: Any = {name: int(number) for name, number in numbers.items() if number is not None}
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise SpqrError(
            f"the other processes are not known ({error}): start the command under SLURM or Open MPI, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def agree(values: Mapping[str, Any]) -> None:
    """Waits for all processes, and makes sure that they have the same values: nested dicts of what `json` has.

    Raises:
      SpqrError: one has another value than the first; which, is named.
    """
    if jax.process_count() == 1:
        return
    own = np.frombuffer(json.dumps(values).encode(), np.uint8)
    most = int(multihost_utils.process_allgather(np.array(own.size)).max())
    texts = multihost_utils.process_allgather(np.pad(own, (0, most - own.size), constant_values=ord(" ")))
    first, *others = (flatten_dict(json.loads(text.tobytes()), sep=".") for text in texts)
    for process, other in enumerate(others, 1):
        for key in (*first, *other):
            if first.get(key) != other.get(key):
                raise SpqrError(
                    f"process {process} has {key} {other.get(key)}, process 0 has {first.get(key)}: all must be given "
                    "the same, and see the same files"
                )
