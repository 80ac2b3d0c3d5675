"""Results on standard output: JSON alone, names as they are, and characters that a terminal lacks."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spqr_jax.cli import console

ROOT = Path(__file__).parents[3]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=os.environ | variables)


def emitted(result: dict, *, as_json: bool) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        console.emit(result, as_json)
    return shown.getvalue()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_null(number: float) -> None:
    content = {"a": number, "b": [1.5, number], "c": {"d": (number, "NaN")}, "e": 3}
    told = emitted(content, as_json=True)
    found = json.loads(told, parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [1.5, None], "c": {"d": [None, "NaN"]}, "e": 3}


@pytest.mark.parametrize(
    "name", ["out [v2]", "[bold]x[/bold]", "[/]", "a:smile:b", "C:\\x", "a  b", "x" * 300, "[red]" * 40, "1e5", "é"]
)
def test_names_are_shown_as_they_are(name: str) -> None:
    assert name in emitted({"destination": name}, as_json=False)
    assert json.loads(emitted({"destination": name}, as_json=True))["destination"] == name


def test_an_error_keeps_the_spaces_of_a_name() -> None:
    assert console.describe(OSError("[a]  b\n  c")) == "[a]  b c"


def test_libraries_print_to_standard_error() -> None:
    """Those in Python, those in C++, and the processes that they start."""
    code = """
import os, subprocess, sys
from spqr_jax.cli import console
print("before")
with console.only_results():
    print("python")
    os.write(1, b"library\\n")
    subprocess.run([sys.executable, "-c", "print('process')"])
    console.emit({"a": 1}, True)
print("after")
"""
    done = python(code)
    assert done.stdout.split(b"\n") == [b"before", b'{"a": 1}', b"after", b""]
    assert {b"python", b"library", b"process"} <= {*done.stderr.split()}


def test_no_output_at_all_is_no_error() -> None:
    done = python("import sys; sys.stdout = None\nfrom spqr_jax.cli import console\nwith console.only_results(): pass")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"caf? ? x"), ("cp1252", b"caf\xe9 ? x"), ("utf-8", "café 日 x".encode())]
)
def test_a_character_that_a_terminal_lacks_does_not_stop_a_text(encoding: str, shown: bytes) -> None:
    code = """
from spqr_jax.cli import console
console.quiet()
with console.only_results():
    print("café 日 x", file=console.results(), flush=True)
    console.emit({"page": "café 日 x"}, False)
"""
    done = python(code, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[0] == shown
    assert shown in done.stdout.split(b"\n", 1)[1]


@pytest.mark.parametrize(
    ("platforms", "reason"),
    [("cuda", "(its plugin is not installed)|Unable"), ("moon", "'moon'"), ("cpu,moon", "'moon'")],
)
def test_a_platform_that_is_not_here_is_one_line(platforms: str, reason: str) -> None:
    code = "import jax; from spqr_jax.cli import console; console.run(lambda: jax.numpy.zeros(3))"
    done = python(code, JAX_PLATFORMS=platforms)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS is {platforms}, but JAX cannot start it (")
    assert any(part in line for part in reason.split("|"))


def test_an_error_of_its_own_does_not_blame_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert console.describe(AssertionError("odd")).startswith("internal error: AssertionError: odd")
