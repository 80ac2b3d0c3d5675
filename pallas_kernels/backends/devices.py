"""The device that JAX computes on."""

import re
from typing import Any

import jax


def device_kind() -> str:
    """Name of the device, such as 'NVIDIA H100 80GB HBM3'."""
    return _device().device_kind


def platform() -> str:
    """Platform of the device: 'cpu', 'gpu' or 'tpu'."""
    return _device().platform


def describe() -> str:
    """Name and platform of the device, for messages."""
    device = _device()
    return f"{device.device_kind} ({device.platform})"


def compute_capability() -> float | None:
    """CUDA compute capability of the device, such as 9.0; None where it is not an NVIDIA GPU."""
    return _capability(_device())


def _capability(device: Any) -> float | None:
    # AMD's GPUs are on the platform 'gpu' too, but there it is a name such as 'gfx90a'.
    capability = getattr(device, "compute_capability", "")
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None


def _device() -> Any:
    default = getattr(jax.config, "jax_default_device", None)
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]
