"""One version: that of pyproject.toml, in a checkout, installed, and on the command line."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.command_line import spqr

import spqr_jax
from spqr_jax import _version

ROOT = Path(__file__).parents[2]


def test_the_version_is_that_of_the_project() -> None:
    assert spqr_jax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_where_there_is_no_checkout_metadata_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _version.find_version(tmp_path) == version("spqr-jax")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9"\n')
    assert _version.find_version(tmp_path) == version("spqr-jax")
    monkeypatch.setattr(_version, "DISTRIBUTION", "no-such-distribution")
    assert _version.find_version(tmp_path) == "unknown"


def test_the_command_prints_versions() -> None:
    done = spqr("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(
        f"spqr-jax {spqr_jax.__version__} (jax {version('jax')}, jaxlib {version('jaxlib')}, "
    )


def test_every_public_name_is_there() -> None:
    assert [name for name in spqr_jax.__all__ if getattr(spqr_jax, name) is None] == []
    assert set(spqr_jax.__all__) <= set(dir(spqr_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spqr_jax.nothing
