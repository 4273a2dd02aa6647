"""Optuna's journal file, made to survive kill -9 and a full disk at any byte, and shared by several processes."""

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

# What the start of every line looks like, so that the torn rest of one is known from a foreign file.
_START = b'{"op_code":'


def open_journal(path: Path) -> JournalStorage:
    """The storage of a journal file, which is made where it is missing.

    Raises:
        ValueError: for a file that is no Optuna journal, naming the line; it is left as it was.
        OSError: where it cannot be written.
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
    """ValueError for a line that Optuna would stumble over, or pass over in silence: those of other trials' numbers."""
    if not path.exists():
        return
    studies: list[str | None] = []  # their names; None for one that was deleted
    trials = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                log = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line)):
                    continue  # the last line of a writer that was killed: the next one drops it
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
    """Why a line is none of a journal with so many studies and trials before it; None where it is one."""
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
