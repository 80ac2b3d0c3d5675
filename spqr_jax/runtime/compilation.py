"""Compiled programs on the disk."""

import os

import jax

from pallas_kernels.tuning.directories import cache_directory


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX has been given another one.

    A later process reads them, where it would compile for seconds. JAX's own settings take precedence:
    `JAX_COMPILATION_CACHE_DIR`, or `JAX_ENABLE_COMPILATION_CACHE=false` to keep none. Where the directory cannot be
    written, nothing is kept.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return
    directory = cache_directory() / "programs"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(directory, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX keeps what takes a second. Starting a command takes dozens of smaller programs.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
