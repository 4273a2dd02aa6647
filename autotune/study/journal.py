"""A journal file for Optuna that survives kill -9 and full disks at any byte and can be shared by processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ramnet.files import require_writable

if TYPE_CHECKING:
    from optuna.storages import JournalStorage

# The start of every line, by which an incomplete line is distinguished from a foreign file.
_START = b'{"op_code":'


def open_journal(path: Path) -> JournalStorage:
    """Open the storage of a journal file, which is created if it is missing.

    Raises:
        ValueError: if the file is not an Optuna journal; the message names the line, and the file is not changed.
        OSError: if it cannot be written.
        ImportError: if Optuna is not installed.
    """
    try:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ImportError("tuning needs optuna, which is not installed: pip install 'ramnet[tune]'") from None

    class Backend(JournalFileBackend):
        """Optuna's own backend leaves its lock behind when killed, and appends to an incomplete last line."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            with path.open("r+b", buffering=0) as file:  # a buffer would be written at its end, after the error
                fcntl.flock(file, fcntl.LOCK_EX)  # the system releases the lock when the process ends
                end = _drop_torn_line(file)
                try:
                    lines = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
                    while lines:
                        lines = lines[file.write(lines) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), end)
                    raise

        def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
            for self.line, log in enumerate(super().read_logs(log_number_from), start=log_number_from + 1):
                yield log

    require_writable(path)
    _check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = Backend(str(path))
    try:
        return JournalStorage(backend)
    except (ValueError, LookupError, TypeError, ArithmeticError, AssertionError) as error:
        raise ValueError(_not_a_line(path, backend.line, f"{type(error).__name__}: {error}")) from None


# The fields of Optuna's journals and their types; by the code of an operation, those that it cannot do without.
_NUMBER, _COUNT, _TEXT, _OBJECT = (int, float), (int,), (str,), (dict,)
_TYPES: dict[str, tuple[type, ...]] = {
    "worker_id": _TEXT, "study_id": _COUNT, "trial_id": _COUNT, "study_name": _TEXT, "directions": (list,),
    "user_attr": _OBJECT, "system_attr": _OBJECT, "param_name": _TEXT, "param_value_internal": _NUMBER,
    "distribution": _TEXT, "state": _COUNT, "values": (list, NoneType), "step": _COUNT, "intermediate_value": _NUMBER,
    "datetime_start": (str, NoneType), "distributions": _OBJECT, "params": _OBJECT, "user_attrs": _OBJECT,
    "system_attrs": _OBJECT, "intermediate_values": _OBJECT,
}  # fmt: skip
_NEEDED: dict[int, tuple[str, ...]] = {
    0: ("study_name", "directions"),
    1: ("study_id",),
    2: ("study_id", "user_attr"),
    3: ("study_id", "system_attr"),
    4: ("study_id", "datetime_start"),
    5: ("trial_id", "param_name", "param_value_internal", "distribution"),
    6: ("trial_id", "state", "values"),
    7: ("trial_id", "step", "intermediate_value"),
    8: ("trial_id", "user_attr"),
    9: ("trial_id", "system_attr"),
    10: (),
}
_CALLED = {int: "an integer", float: "a number", str: "a text", list: "a list", dict: "an object", NoneType: "null"}


def _check(path: Path) -> None:
    """Raise ValueError for a line on which Optuna would fail, or which it would ignore, as of unknown trials."""
    if not path.exists():
        return
    studies: list[str | None] = []  # names of studies; None for a deleted one
    trials = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                log = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line)):
                    continue  # the last line of a killed writer, which the next writer removes
                raise ValueError(_not_a_line(path, number, "it is not JSON")) from None
            why = _refusal(log, len(studies), trials)
            if why is not None:
                raise ValueError(_not_a_line(path, number, why))
            if log["op_code"] == 0 and log["study_name"] not in studies:
                studies.append(log["study_name"])
            elif log["op_code"] == 1:
                studies[log["study_id"]] = None
            elif log["op_code"] == 4:
                trials += studies[log["study_id"]] is not None


def _refusal(log: Any, studies: int, trials: int) -> str | None:
    """Return why a line is not valid after ``studies`` studies and ``trials`` trials, or None if it is."""
    if type(log) is not dict or type(log.get("op_code")) is not int or log["op_code"] not in _NEEDED:
        return f"op_code must be one of {min(_NEEDED)} to {max(_NEEDED)}"
    for name in ("worker_id", *_NEEDED[log["op_code"]]):
        if name not in log:
            return f"{name} is missing"
    for name, value in log.items():
        types = _TYPES.get(name, (type(value),))
        if type(value) not in types:
            return f"{name} is {value!r:.40}; it must be {' or '.join(_CALLED[kind] for kind in types)}"
    for name, known in (("study_id", studies), ("trial_id", trials)):
        if name in log and not 0 <= log[name] < known:
            return f"{name} is {log[name]!r:.40}, and {known} were begun before it"
    return None


def _not_a_line(path: Path, number: int, why: str) -> str:
    return f"{path}, line {number}, is not a line of an Optuna journal: {why}; name another file"


def _drop_torn_line(file: Any) -> int:
    """Truncate the file after its last complete line, seek to its end, and return its size."""
    end = file.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start and b"\n" not in tail:
        start = max(0, start - 4096)
        file.seek(start)
        tail = file.read(end - start)
    whole = start + tail.rfind(b"\n") + 1
    file.truncate(whole)
    return int(file.seek(whole))
