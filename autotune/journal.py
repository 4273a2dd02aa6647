"""Optuna's journal file, made to survive kill -9 and a full disk at any byte, and shared by several processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.storages import JournalStorage

# What the start of every line looks like, so that the torn rest of one is known from a foreign file.
_START = b'{"op_code":'


def open_journal(path: Path) -> JournalStorage:
    """The storage of a journal file, which is made where it is missing.

    Raises:
        ValueError: for a file that is no Optuna journal, naming the line.
        ImportError: with the install line, where Optuna is missing.
    """
    try:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ImportError("tuning needs optuna, which is not installed: pip install 'ramnet[tune]'") from None

    class Backend(JournalFileBackend):
        """Optuna's own leaves its lock behind when killed, and appends to the torn line of a writer that died."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when a process ends, however it ends
                end = _drop_torn_line(file)
                try:
                    for log in logs:
                        file.write(json.dumps(log, separators=(",", ":")).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), end)
                    raise

    _check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(Backend(str(path)))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not a journal that can be read: {error!r}; name another file") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` (made where missing) against other processes within the block."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the journal must be a file")
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
            except ValueError:
                fields = None
                if not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line)):
                    continue  # the last line of a writer that was killed: the next one drops it
            if not isinstance(fields, dict) or not isinstance(fields.get("op_code"), int):
                raise ValueError(f"{path}, line {number}, is not a line of an Optuna journal; name another file")


def _drop_torn_line(file: Any) -> int:
    """Cut what follows the last line's end, and stand there; the file's size."""
    end = file.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start and b"\n" not in tail:
        start = max(0, start - 4096)
        file.seek(start)
        tail = file.read(end - start)
    whole = start + tail.rfind(b"\n") + 1
    file.truncate(whole)
    return int(file.seek(whole))
