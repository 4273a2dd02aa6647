"""Files that several processes write, and files that cannot be written."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ramnet.files import locked, locked_alone, require_writable, write_text_atomic
from tests.samples import read_only_folder


def count(path: Path, times: int) -> None:
    """Add 1 to the number in a file, which is replaced each time."""
    for _ in range(times):
        with locked(path):
            write_text_atomic(path, str(int(path.read_text() or 0) + 1))


def test_several_processes_change_a_file_in_turn_and_leave_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "count"
    processes = [multiprocessing.get_context("fork").Process(target=count, args=(path, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert path.read_text() == "200"
    assert [found.name for found in path.parent.iterdir()] == ["count"]


def test_a_killed_process_releases_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()

    def hold() -> None:
        with locked(tmp_path / "file"):
            theirs.send("held")
            theirs.recv()

    process = context.Process(target=hold)
    process.start()
    theirs.close()
    assert mine.recv() == "held"
    process.kill()
    process.join()
    with locked(tmp_path / "file"):
        pass


def test_require_writable_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    require_writable(tmp_path / "old", tmp_path / "new", tmp_path / "folder" / "below" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    folder = read_only_folder(tmp_path)
    for path in (folder / "file", folder / "below" / "file"):
        with pytest.raises(OSError, match=f"^{path} cannot be written: (Permission denied|Read-only file system)$"):
            require_writable(path)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps programs that run from being written, by root too")
def test_a_read_only_file_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy(shutil.which("cat") or "", program)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None and running.stdout is not None
        running.stdin.write(b"x")
        running.stdin.flush()
        assert running.stdout.read(1) == b"x"
        with pytest.raises(OSError, match="program cannot be written: Text file busy"):
            require_writable(program)


def test_something_other_than_a_file_is_refused_without_blocking(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name, what in (("folder", "a folder"), ("pipe", "not a regular file"), ("link", "not a regular file")):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is {what}; it must be a file")):
            require_writable(tmp_path / name)
    with pytest.raises(OSError, match="file/below cannot be written: Not a directory"):
        require_writable(tmp_path / "file" / "below")
    with pytest.raises(OSError, match="link/below/it cannot be written: No such file or directory"):
        require_writable(tmp_path / "link" / "below" / "it")


def test_two_results_cannot_be_one_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ValueError, match="link is given for two files"):
        require_writable(tmp_path / "link", tmp_path / "file")


def test_a_lock_for_one_is_refused_to_others_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / ".lock"
    with locked_alone(path, "in use"):
        with pytest.raises(ValueError, match=r"^in use$"), locked_alone(path, "in use"):
            pass
        assert path.exists()
    assert list(tmp_path.iterdir()) == []
    with locked_alone(path, "in use"):
        (path.parent / "result").write_text("kept")
    assert [each.name for each in path.parent.iterdir()] == ["result"]


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked_alone(tmp_path / "new" / ".lock", "in use"):
        pass
    assert list(tmp_path.iterdir()) == []
