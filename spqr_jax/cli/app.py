"""The application `spqr`, and the table of its commands."""

import platform
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Annotated, Any

import jax
import typer

import spqr_jax
from spqr_jax.cli import console, interrupts

COMMANDS: Mapping[str, str] = {
    "quantize": "spqr_jax.cli.quantize:quantize",
    "sweep": "spqr_jax.cli.sweep:sweep",
    "eval": "spqr_jax.cli.evaluate:evaluate",
    "compare": "spqr_jax.cli.compare:compare",
    "analyze": "spqr_jax.cli.analyze:analyze",
    "tasks": "spqr_jax.cli.tasks:tasks",
    "generate": "spqr_jax.cli.generate:generate",
    "chat": "spqr_jax.cli.chat:chat",
    "inspect": "spqr_jax.cli.inspect:inspect",
    "report": "spqr_jax.cli.report:report",
    "export": "spqr_jax.cli.export:export",
}
"""The function of every command, in the order of `spqr --help`; the README of `spqr_jax` says how to add one."""

RESUMABLE: Mapping[str, str | None] = {"quantize": None, "sweep": None, "generate": "prompts"}
"""Commands that keep their finished work, from which the same command resumes; where not always, with which option."""

EPILOG = (
    "Results go to standard output, progress to standard error. Exit status: 0 done, 1 an error in one line, 2 wrong "
    "usage, 130 interrupted. SPQR_TRACEBACK=1 prints the traceback of an error as well."
)


def build(commands: Mapping[str, str]) -> typer.Typer:
    """An application with these commands, each as `module:function`."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        epilog=EPILOG,
        callback=about,
    )
    for name, function in commands.items():
        app.command(name)(_ending_well(name, resolve_name(function)))
    return app


def _ending_well(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """A command that alone prints to standard output, and whose interruption is told."""

    @wraps(function)
    def command(**options: Any) -> None:
        needed = RESUMABLE.get(name)
        resumes = name in RESUMABLE and (needed is None or options[needed] is not None)
        try:
            with interrupts.raising(), console.only_results(), jax.enable_x64(False):
                function(**options)
        except KeyboardInterrupt:  # before typer, which would exit without a word
            console.interrupted(resumes=resumes)
        except Exception:
            if interrupts.asked():
                console.interrupted(resumes=resumes)
            raise

    return command


def print_version(asked: bool) -> bool:
    """Prints the versions that a report of a bug needs and exits, if asked to; otherwise returns the option's value."""
    if asked:
        parts = [f"{name} {version(name)}" for name in ("jax", "jaxlib")]
        print(f"spqr-jax {spqr_jax.__version__} ({', '.join(parts)}, python {platform.python_version()})")
        raise typer.Exit
    return asked


def about(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Near-lossless compression of language models to 3-4 bits per weight."""


app = build(COMMANDS)
