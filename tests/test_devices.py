"""The tests that need eight devices, all in one process that has them."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.virtual_devices import environment

ROOT = Path(__file__).parents[1]
MARK = "@pytest.mark.devices"
FILES = [path for path in sorted(ROOT.glob("tests/*/**/test_*.py")) if MARK in path.read_text()]


@pytest.mark.slow
def test_on_eight_devices() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "devices", *map(str, FILES)]
    result = subprocess.run(command, env=environment(8), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout
