"""Which implementation runs on this machine's device."""

import re
from typing import Any, Literal

import jax

from pallas_kernels.errors import SpqrError

Implementation = Literal["pallas", "xla", "interpret"]

LEAST_CAPABILITY = 8.0


def choose(implementation: Implementation | None) -> Implementation:
    """The implementation asked for, or the best one for the device that JAX computes on.

    Raises:
      SpqrError: there is none of this name, or it needs another device.
    """
    if implementation is None:
        return "pallas" if _supported(_device()) else "xla"
    if implementation not in ("pallas", "xla", "interpret"):
        raise SpqrError(f"implementation is {implementation!r}, but must be 'pallas', 'xla', 'interpret' or None")
    if implementation == "pallas" and not _supported(device := _device()):
        raise SpqrError(
            f"implementation='pallas' needs an NVIDIA GPU of compute capability {LEAST_CAPABILITY} or more, but JAX "
            f"computes on {device.device_kind} ({device.platform}); leave it out, or ask for 'xla'"
        )
    return implementation


def device_kind() -> str:
    """Name of the device that JAX computes on, such as 'NVIDIA H100 80GB HBM3'."""
    return _device().device_kind


def _device() -> Any:
    default = getattr(jax.config, "jax_default_device", None)
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def _supported(device: Any) -> bool:
    # On AMD's GPUs, which have the same platform, it is a name.
    capability = getattr(device, "compute_capability", "")
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= LEAST_CAPABILITY
