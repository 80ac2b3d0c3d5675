"""Several devices on one machine. JAX settles their number when it starts, so they need a process of their own."""

import os

import jax


def environment(devices: int) -> dict[str, str]:
    """Variables for a process with so many devices, which are all this machine's CPU; it shares the compile cache."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.jax_persistent_cache_min_compile_time_secs),
    }
