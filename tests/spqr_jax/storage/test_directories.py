"""A directory is there as it was or as it will be, whatever happens in between."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from spqr_jax.storage import directories
from spqr_jax.storage.directories import new_directory

# Replaces a directory once for each event at which it can be killed, in a child of a process without threads.
KILL_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from spqr_jax.storage.directories import new_directory
root = Path(sys.argv[1])
destination = root / "results"
left = None

def kill(event, args):
    global left
    if left is not None and event.split(".")[0] in ("open", "os", "shutil", "pathlib"):
        left -= 1
        if left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
status, events, contents = signal.SIGKILL, 0, []
while status == signal.SIGKILL:
    child = os.fork()
    if not child:
        left = events
        with new_directory(destination) as directory:
            (directory / "version").write_text(str(events))
            (directory / "folder").mkdir()
            (directory / "folder" / "file").write_text(str(events))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    contents.append([int((destination / name).read_text()) for name in ("version", "folder/file")])
    events += 1
print(status, contents)
"""


def write(destination, text):
    with new_directory(destination) as directory:
        (directory / "version").write_text(text)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_process_killed_at_any_moment_leaves_the_old_content_or_the_new(tmp_path):
    with new_directory(tmp_path / "results") as directory:
        (directory / "version").write_text("-1")
        (directory / "folder").mkdir()
        (directory / "folder" / "file").write_text("-1")
    command = [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    status, contents = printed.split(" ", 1)
    assert int(status) == 0
    last = -1
    for event, (version, file) in enumerate(json.loads(contents)):
        assert version == file in (last, event)
        last = version
    assert last == event > 10


@pytest.mark.parametrize("exchange", ["at once", "refused", "unknown"])
def test_what_was_there_is_replaced_and_nothing_is_left_over(tmp_path, monkeypatch, exchange):
    if exchange == "refused":  # as by a file system that cannot
        monkeypatch.setattr(directories, "RENAME_EXCHANGE", 1 << 30)
    if exchange == "unknown":  # to the operating system
        monkeypatch.setattr(sys, "platform", "darwin")
    write(tmp_path / "results", "old")
    write(tmp_path / "results", "new")
    assert names(tmp_path) == ["results"]
    assert (tmp_path / "results" / "version").read_text() == "new"


def test_a_refused_replacement_leaves_the_old_content(tmp_path, monkeypatch):
    write(tmp_path / "results", "old")
    monkeypatch.setattr(sys, "platform", "darwin")
    rename = directories.Path.rename

    def refuse(path, target):
        if ".incomplete-" in path.name:
            raise OSError("refused")
        return rename(path, target)

    monkeypatch.setattr(directories.Path, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        write(tmp_path / "results", "new")
    assert names(tmp_path) == ["results"]
    assert (tmp_path / "results" / "version").read_text() == "old"


@pytest.mark.parametrize("before", [{}, {"version": "old", "gone": ""}])
@pytest.mark.parametrize("linked", [True, False])
def test_the_working_directory_is_filled(before, linked, tmp_path, monkeypatch):
    destination = tmp_path / "results"
    destination.mkdir()
    for name, text in before.items():
        (destination / name).write_text(text)
    monkeypatch.chdir(destination)
    if not linked:
        monkeypatch.setattr(directories.os, "link", mock.Mock(side_effect=OSError("no links here")))
    with new_directory(destination) as directory:
        (directory / "version").write_text("new")
        (directory / "folder").mkdir()
        (directory / "folder" / "file").write_text("new")
    # As a shell that stands in it sees it: by its place, not by its name.
    assert sorted(os.listdir(".")) == ["folder", "version"]
    assert [Path(name).read_text() for name in ("version", "folder/file")] == ["new", "new"]
    assert names(tmp_path) == ["results"]


def test_a_working_directory_that_is_deleted_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    write(tmp_path / "results", "new")
    assert (tmp_path / "results" / "version").read_text() == "new"
