"""Several processes that run the same program on the devices of one mesh, under `jax.distributed`.

The first process writes files and messages. All compute, and all must reach the same points of the program.
"""

import json
import os
import signal
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from pallas_kernels.errors import SpqrError

HEARTBEAT_SECONDS = 30
"""A process that is silent for this long counts as dead, and the others exit."""


INTERRUPTED = 130
"""Exit status of an interrupted process."""


def end_on_interrupt(tell: Callable[[], object]) -> None:
    """Ends this process on Ctrl-C, from a thread; call it before `join`.

    The main thread may wait for other processes inside a library, where Python handles no signals. An ordinary exit
    would wait for them too, and they for this one.

    Args:
      tell: called first.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reading, 1) != bytes([signal.SIGINT]):
            continue
        tell()
        os._exit(INTERRUPTED)

    Thread(target=watch, daemon=True).start()


def join() -> None:
    """Joins the other processes; call it before anything else of JAX.

    JAX detects the processes under SLURM, Open MPI, Kubernetes and on TPUs. Elsewhere the environment names them:
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      SpqrError: neither detects them, or the first cannot be reached.
    """
    numbers = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        given: Any = {name: int(number) for name, number in numbers.items() if number is not None}
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise SpqrError(
            f"the first process cannot be reached ({error}): start all processes, with its host and port in "
            "JAX_COORDINATOR_ADDRESS"
        ) from None
    except ValueError as error:
        raise SpqrError(
            f"the other processes are not known ({error}): start the command under SLURM or Open MPI, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def agree(values: Mapping[str, Any]) -> None:
    """Waits for all processes, and checks that they have the same values: nested dicts of JSON types.

    Raises:
      SpqrError: a process has another value than the first; the message names it and both values.

    Example:
      >>> agree({"config": {"bits": 3}})
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
                    f"process {process} has {key} {other.get(key)}, process 0 has {first.get(key)}: give all processes "
                    "the same arguments and the same files"
                )
