"""Files are written atomically under all kinds of failures."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ramnet.files import clear_asides, folder_written_aside, read_text, write_text_atomic, written_aside
from tests.samples import full_disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_writes_the_whole_text_and_makes_folders(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a" / "b" / "c.txt", "γ = 1\n")
    assert read_text(tmp_path / "a" / "b" / "c.txt") == "γ = 1\n"
    assert names(tmp_path) == ["a", "b", "c.txt"]


def test_a_result_is_readable_as_the_umask_grants(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text_atomic(tmp_path / "c.txt", "x")
    assert stat.S_IMODE((tmp_path / "c.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "old.txt", "old")
    for path in (tmp_path / "old.txt", tmp_path / "new" / "folder" / "new.txt"):
        with pytest.raises(error), written_aside(path) as aside:
            aside.write_text("half")
            raise error
    assert names(tmp_path) == ["old.txt"]
    assert read_text(tmp_path / "old.txt") == "old"


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "old.txt", "old")
    with full_disk(after=10), pytest.raises(OSError, match="File too large"):
        write_text_atomic(tmp_path / "old.txt", "x" * 1000)
    assert names(tmp_path) == ["old.txt"]
    assert read_text(tmp_path / "old.txt") == "old"


def test_an_error_of_the_system_names_the_file_and_keeps_its_number(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'c.txt'} cannot be written: No space")) as raised:  # noqa: SIM117
        with written_aside(tmp_path / "c.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.errno == errno.ENOSPC


def test_a_file_and_its_folder_are_synced_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []  # a folder? was the file in its place?
    system = os.fsync

    def noted(handle: int) -> None:
        system(handle)
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), (tmp_path / "c.txt").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    write_text_atomic(tmp_path / "c.txt", "x")
    assert synced == [(False, False), (True, True)]


def test_a_folder_and_its_files_are_synced_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    synced: list[tuple[str, bool]] = []  # what? was the folder in its place?
    monkeypatch.setattr("ramnet.files.sync", lambda path: synced.append((path.name, folder.exists())))
    with folder_written_aside(folder) as aside:
        (aside / "x").write_text("x")
    assert synced == [("x", False), ("new", False), (tmp_path.name, True)]


def test_a_folder_that_cannot_be_replaced_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramnet.files._exchange", lambda *_: False)
    with folder_written_aside(tmp_path / "a") as aside:
        (aside / "1").write_text("1")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"), folder_written_aside(tmp_path / "a") as aside:
        (aside / "2").write_text("2")
    assert names(tmp_path) == ["1", "a"]


def free_handles() -> list[int]:
    """The lowest free file descriptors."""
    handles = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    for handle in handles:
        os.close(handle)
    return handles


def test_no_handle_stays_open(tmp_path: Path) -> None:
    before = free_handles()
    (tmp_path / ".c.txt.left.aside").mkdir()
    write_text_atomic(tmp_path / "c.txt", "x")
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "c.txt"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["c.txt"]
    assert free_handles() == before
    with written_aside(tmp_path / "c.txt") as aside:
        aside.write_text("y")
        held = free_handles()
        clear_asides(tmp_path)  # this process is still running
        assert free_handles() == held
    assert read_text(tmp_path / "c.txt") == "y"


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_atomically(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    if not exchanges:
        monkeypatch.setattr("ramnet.files._exchange", lambda *_: False)
    for number in "123":
        with folder_written_aside(folder) as aside:
            (aside / number).write_text(number)
    assert names(tmp_path) == ["3", "a", "b"]
    with pytest.raises(KeyboardInterrupt), folder_written_aside(folder) as aside:
        (aside / "4").write_text("4")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["3", "a", "b"]


KILLED = """
import os, signal, sys
from ramnet.files import written_aside
with written_aside(sys.argv[1]) as aside:
    aside.write_text("half")
    print(flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "killed" else sys.stdin.read()
"""


def test_temporary_folders_of_killed_processes_are_removed_and_those_of_running_ones_are_not(tmp_path: Path) -> None:
    def begin(how: str) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "c[1].txt"), how]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()  # type: ignore[union-attr]
        return process

    living, killed = begin("living"), begin("killed")
    assert killed.wait() == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    write_text_atomic(tmp_path / "c[1].txt", "whole")
    assert len(list(tmp_path.iterdir())) == 2  # the file, and the temporary folder of the running process
    living.communicate()
    assert living.returncode == 0
    assert names(tmp_path) == ["c[1].txt"] and read_text(tmp_path / "c[1].txt") == "half"


@pytest.mark.parametrize("below", ["c.txt", "x/c.txt", "x/y/c.txt"])
def test_a_path_below_a_file_names_that_file(below: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with pytest.raises(NotADirectoryError, match=re.escape(f"cannot be written: {tmp_path / 'plain'} is not a folder")):
        write_text_atomic(tmp_path / "plain" / below, "y")
    assert names(tmp_path) == ["plain"]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"c\.txt is not a text file: byte 3 is not UTF-8"):
        read_text(tmp_path / "c.txt")
