"""The directories of tuned tiles: those of the package, and the user's."""

import os
import sys
from pathlib import Path

PACKAGED = Path(__file__).parent / "gpus"
"""The trials that the package ships; read only."""

VARIABLE = "SPQR_JAX_CACHE_DIR"
"""Environment variable that overrides the cache directory."""


def cache_directory() -> Path:
    """The user's cache directory: `$SPQR_JAX_CACHE_DIR`, or what the platform uses.

    That is `$XDG_CACHE_HOME/spqr-jax` or `~/.cache/spqr-jax` on Linux, `~/Library/Caches/spqr-jax` on macOS, and
    `%LOCALAPPDATA%\\spqr-jax\\Cache` on Windows.

    Source: the XDG base directory specification, 0.8, which says to ignore relative paths.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "spqr-jax" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "spqr-jax"
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else home / ".cache") / "spqr-jax"


def tiles_directory() -> Path:
    """The directory for the user's trials."""
    return cache_directory() / "tiles"
