"""Paths as users write them."""

from pathlib import Path

import pytest

from spqr_jax.storage.destination import check_outside
from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.paths import absolute


def test_a_path_stays_the_same_when_the_directory_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute("a/b") == tmp_path / "a" / "b"
    assert absolute(".") == tmp_path
    assert absolute("~") == tmp_path / "home"
    assert absolute("~/a [v2]\\b ") == tmp_path / "home" / "a [v2]\\b "
    assert absolute("./~") == tmp_path / "~"
    assert absolute(Path("a~b")) == tmp_path / "a~b"


def test_links_are_kept(tmp_path: Path) -> None:
    # The hub's cache links `model.gguf` to a file whose name has no suffix.
    (tmp_path / "blob").touch()
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blob")
    assert absolute(tmp_path / "model.gguf").name == "model.gguf"


@pytest.mark.parametrize("destination", ["source", "source/out", "source/a/b", "link/out", "other/../source/out", "."])
def test_a_destination_in_the_source_is_refused(
    destination: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    monkeypatch.chdir(tmp_path / "source" if destination == "." else tmp_path)
    with pytest.raises(CheckpointError, match="choose a destination outside"):
        check_outside(destination, tmp_path / "source")


def test_other_destinations_are_not(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for destination in ("source-spqr", "out", "source.partial"):
        check_outside(tmp_path / destination, tmp_path / "source")
    check_outside("someone/model/out", "someone/model")  # a hub id, which is no directory here
