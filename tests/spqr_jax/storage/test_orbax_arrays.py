"""Arrays on the disk: below any path, and the same as in memory."""

import logging
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from spqr_jax.storage import orbax_arrays
from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.orbax_arrays import read_arrays, write_arrays

ARRAYS = {
    "layers_0.codes": np.arange(6, dtype=np.uint32).reshape(2, 3),
    "norm": np.array([np.nan, -0.0], ml_dtypes.bfloat16),
}
PATHS = (
    "runs [v2]",
    "[",
    "a]b",
    "back\\slash",
    "st*r",
    "wh?t",
    "[!a]\\*",
    "per%20cent",
    "{x}",
    " spaces ",
    "~",
    "ü",
    "#1",
)


@pytest.mark.parametrize("name", PATHS)
def test_arrays_come_back_below_any_path(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written, moved = tmp_path / name / "below" / "part", tmp_path / "moved"
    write_arrays(written, ARRAYS)
    shutil.copytree(written, moved)
    for directory in (written, moved):
        found = read_arrays(directory)
        assert {key: array.tobytes() for key, array in found.items()} == {k: a.tobytes() for k, a in ARRAYS.items()}
    assert {path.name for path in tmp_path.iterdir()} == {name, "moved"}
    assert not caplog.records


def test_a_neighbour_that_matches_the_path_as_a_pattern_is_left_alone(tmp_path: Path) -> None:
    write_arrays(tmp_path / "run1" / "part", {"a": np.zeros(3)})
    write_arrays(tmp_path / "run?" / "part", {"b": np.ones(3)})
    assert (list(read_arrays(tmp_path / "run1" / "part")), list(read_arrays(tmp_path / "run?" / "part"))) == (
        ["a"],
        ["b"],
    )


def test_one_of_several_processes_writes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def layout(name: str) -> set[str]:
        return {path.name for path in (tmp_path / name).iterdir()}

    write_arrays(tmp_path / "one", ARRAYS)
    monkeypatch.setattr(orbax_arrays, "_write", orbax_arrays._write_alone)
    write_arrays(tmp_path / "several", ARRAYS)
    assert layout("one") - layout("several") <= {"orbax.checkpoint"}
    assert layout("several") <= layout("one")
    assert list(read_arrays(tmp_path / "several")) == list(ARRAYS)


@pytest.mark.parametrize(
    "damaged", [{}, {"a": np.zeros(3, np.float16)}, {"a": np.array([0.0, -0.0, 0.0])}, {"a": np.zeros((3, 1))}]
)
def test_arrays_that_come_back_differently_are_an_error(
    damaged: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax_arrays, "read_arrays", lambda directory: damaged)
    with pytest.raises(CheckpointError, match="does not have the a that was written"):
        write_arrays(tmp_path / "part", {"a": np.zeros(3)})


def test_warnings_of_orbax_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "part.orbax-checkpoint-tmp").mkdir()
    write_arrays(tmp_path / "part", ARRAYS)
    assert [record.levelno for record in caplog.records if record.name == "absl"] == [logging.WARNING]
