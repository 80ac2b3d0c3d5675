"""Tests that compile for GPUs ahead of time, which needs the packages of `make aot-env`."""

import pytest

from pallas_kernels.aot import compiler


def _missing() -> str:
    """The reason why nothing can be compiled, or an empty string."""
    try:
        compiler.check_installed()
    except ModuleNotFoundError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(_missing()), reason=_missing())
