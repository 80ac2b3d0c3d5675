"""Runs the entry point `spqr` in this process, which saves compiling anew."""

import contextlib
import io
import json
import sys
from typing import NamedTuple
from unittest import mock

from spqr_jax.cli import main


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def spqr(*arguments: object) -> Done:
    """Runs the entry point in this process, which saves compiling anew."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["spqr", *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, stdout.getvalue(), stderr.getvalue())


def result(*arguments: object) -> dict:
    done = spqr(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
