"""The command line `spqr`: quantize, sweep, eval, compare, analyze, tasks, generate, inspect, report, export.

Results go to standard output, progress to standard error. Exit status: 0 done, 1 an error told in one line, 2 wrong
usage.
"""

from spqr_jax.cli import (  # noqa: F401
    analyze,
    console,
    evaluate,
    export,
    generate,
    inspect,
    quantize,
    report,
    sweep,
    tasks,
)
from spqr_jax.cli.app import app


def main() -> None:
    """Entry point of `spqr`."""
    console.quiet()
    console.run(app)
