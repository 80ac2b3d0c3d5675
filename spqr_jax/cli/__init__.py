"""The command line `spqr`: quantize, sweep, eval, compare, analyze, tasks, generate, chat, inspect, report, export.

Results go to standard output, progress to standard error. Exit status: 0 done, 1 an error in one line, 2 wrong usage,
130 interrupted. With SPQR_TRACEBACK=1, every error prints its traceback as well.

This module imports nothing but the standard library, so that a missing package ends in one line.
"""

import sys
from importlib.util import find_spec

from spqr_jax.cli import interrupts

NEEDED = (
    "flax",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "markupsafe",
    "optax",
    "orbax",
    "rich",
    "safetensors",
    "scipy",
    "threadpoolctl",
    "tokenizers",
    "transformers",
    "typer",
)
"""Packages of the extra `models`, by the names of their modules."""


def main() -> None:
    """Runs `spqr` with the arguments of this process."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f'error: spqr needs {", ".join(missing)}: pip install "spqr-jax[models]"', file=sys.stderr)
        raise SystemExit(1)
    with interrupts.leaving_at_once():
        from spqr_jax.cli import console
        from spqr_jax.cli.app import app
        from spqr_jax.runtime.compilation import keep_programs

        console.quiet()
        keep_programs()
        try:
            console.run(app)
        except SystemExit as stop:
            if stop.code == interrupts.STATUS:
                interrupts.leave()
            raise
