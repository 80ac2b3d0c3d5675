"""Ctrl-C while packages are imported, in work, and where Python drops it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

START = """
import os, signal, sys, weakref
from spqr_jax.cli import console, interrupts

def press():
    os.kill(os.getpid(), signal.SIGINT)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_before_work_it_ends_the_process_at_once() -> None:
    done = python("with interrupts.leaving_at_once():\n    press()\n    print('not here')")
    assert (done.returncode, done.stdout, done.stderr) == (interrupted_status(), "", "interrupted\n")


def interrupted_status() -> int:
    return 128 + signal.SIGINT


@pytest.mark.parametrize(
    "work",
    [
        "press()",
        # Dropped by Python: raised in a callback of garbage collection.
        "class Late:\n    def __del__(self): press()\nLate()\nimport time\ntime.sleep(3)",
        # Turned into another error, as while an extension is imported.
        "try: press()\nexcept KeyboardInterrupt: raise ImportError('extension')",
    ],
)
@pytest.mark.parametrize(
    ("command", "options", "resumes"),
    [("quantize", {}, True), ("generate", {"prompts": None}, False), ("generate", {"prompts": "a.jsonl"}, True)],
)
def test_in_work_it_is_told(work: str, command: str, options: dict[str, str | None], resumes: bool) -> None:
    lines = "\n".join(f"    {line}" for line in work.splitlines())
    code = f"""
from spqr_jax.cli.app import _ending_well
def work(**options):
{lines}
_ending_well({command!r}, work)(**{options})
"""
    done = python(code)
    told = "interrupted, the same command resumes\n" if resumes else "interrupted\n"
    assert (done.returncode, done.stdout, done.stderr) == (interrupted_status(), "", told)


def test_afterwards_the_handlers_are_those_of_before() -> None:
    code = """
before = signal.getsignal(signal.SIGINT), sys.unraisablehook
with interrupts.leaving_at_once(), interrupts.raising():
    pass
assert before == (signal.getsignal(signal.SIGINT), sys.unraisablehook)
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interrupts.raising():
    press()
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")
