"""Records of tuned schedules: the best schedule found for each workload and device, in sorted JSON Lines files.

Tuning writes records to the user's folder. The records shipped beside this module are read-only; they are used for
workloads and devices without a record in the user's folder.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ramnet.config import check_constants, one_line
from ramnet.files import locked, named_folder, read_text, write_text_atomic
from schedules.base import Schedule
from schedules.kinds import FORMER_FORMS, default_schedule, schedule_of
from schedules.workload import Workload

How = Literal["measured", "modelled, not run"]  # modelled: predicted from the binary compiled for the target
SHIPPED = Path(__file__).parent / "records"
# The largest file that is read, about 25 000 rows, which takes each process 1.5 s.
MOST_BYTES = 1 << 24
MOST_KNOB = 1 << 16


class Time(BaseModel):
    """Seconds of one call: the median and the interquartile range of ``runs`` interleaved samples.

    A modelled time has a spread of 0 and 0 runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    median: float = Field(gt=0)
    spread: float = Field(ge=0)
    runs: int = Field(ge=0)


class Launch(BaseModel):
    """The resources of the binary of one launch; see ``lowering.gpu.resources.Resources``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    registers: int
    spilled: int
    local: int
    shared: int


class Record(BaseModel):
    """The best schedule found for a workload on a device, and how it was found."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    workload: Workload
    target: str
    device: str
    knobs: dict[str, Any]
    how: How
    gain: float  # the default's time divided by this one's, median of paired rounds; 1 if the default is the best
    gain_spread: float
    tuned: Time
    default: Time
    eager: Time | None = None  # None if the record is modelled
    trials: int
    fingerprint: str  # of the kernel's source and its compilers; modelled, of the time model too
    versions: dict[str, str]
    date: str
    launches: tuple[Launch, ...] = ()  # of a GPU's schedule that was compiled without being run

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        """Refuse what no kernel has: sizes below 1, constants that the ops refuse, and knobs that are negative."""
        for axis, size in self.workload.shape.items():
            if size < 1:
                raise ValueError(f"workload.shape.{axis} is {size}; it must be at least 1")
        if unknown := self.workload.constants.keys() - {"decay_power", "eps", "proxy_eps"}:
            raise ValueError(f"workload.constants has {min(unknown)!r}; there are decay_power, eps and proxy_eps")
        check_constants(**self.workload.constants)
        for name, value in self.knobs.items():
            if isinstance(value, int) and not 0 <= value <= MOST_KNOB:
                raise ValueError(f"knobs.{name} is {value}; it must be in 0..{MOST_KNOB}")
        return self

    @property
    def key(self) -> tuple[str, str]:
        return self.workload.name, self.device

    def schedule(self) -> Schedule:
        """Return the validated schedule."""
        return schedule_of(self.workload.op, self.target, self.knobs)


def records_path(target: str) -> Path:
    """Return the user's file of a target, in the folder ``RAMNET_RECORDS`` or, if not set, the user's data folder.

    Raises ValueError if that path exists and is not a folder.
    """
    folder = records_folder()
    if os.path.lexists(folder) and not folder.is_dir():
        named = f"RAMNET_RECORDS is {folder}, which" if os.environ.get("RAMNET_RECORDS") else str(folder)
        raise ValueError(f"{named} is not a folder; it must name the folder of the records")
    return folder / f"{target}.jsonl"


def records_folder() -> Path:
    """Return the folder of the user's records, which may not exist yet."""
    import platformdirs

    given = named_folder("RAMNET_RECORDS")
    return given or platformdirs.user_data_path("ramnet", appauthor=False) / "records"


def shipped_path(target: str) -> Path:
    """Return the file of a target's shipped records."""
    return SHIPPED / f"{target}.jsonl"


def known(target: str, path: Path | None = None) -> list[Record]:
    """Return the user's records of a target, or those in ``path``, and shipped ones of other workloads and devices.

    Raises ValueError as ``records_path`` and ``load`` do.
    """
    files = [shipped_path(target)]
    with suppress(RuntimeError):  # without a home folder, there are no records of the user's
        files.append(records_path(target) if path is None else path)
    return list({record.key: record for file in files for record in load(file) if record.target == target}.values())


def load(path: Path) -> list[Record]:
    """Read the records of a file; none if it is missing. Raises ValueError, naming the line, if one is not a record."""
    if not os.path.lexists(path):
        return []
    if not path.is_file():
        raise ValueError(f"{path} is not a file; records are lines of one")
    state = path.stat()
    return list(_known(path, (state.st_mtime_ns, state.st_ino, state.st_size)))


@lru_cache(maxsize=16)
def _known(path: Path, _state: tuple[int, ...]) -> tuple[Record, ...]:
    return tuple(_read(path))


def _read(path: Path) -> list[Record]:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; records are read up to {MOST_BYTES}: remove the rows of devices"
            " and workloads that nobody uses"
        )
    records = []
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
        try:
            record = Record.model_validate_json(line)
            if record.knobs.get("form") in FORMER_FORMS.get(record.workload.op, {}):
                continue
            record.schedule()
        except ValidationError as error:
            raise ValueError(f"{path}, line {number}, is not a record: {one_line(error)}") from None
        except ValueError as error:  # an op that the target has no kernel for
            raise ValueError(f"{path}, line {number}, is not a record: {error}") from None
        records.append(record)
    return records


def merge(path: Path, found: Sequence[Record], compared: Collection[Schedule] | None = None) -> list[Record]:
    """Add ``found`` to the file, replacing rows of the same target, workload and device. Processes may do so
    concurrently.

    Modelled rows of a workload that was measured on any device of the target are removed.

    Args:
        compared: the schedules that ``found`` was compared with. A row with another schedule is not replaced. None
            replaces every row.

    Returns:
        The records of ``found`` that were not added.
    """
    path = path.resolve()  # replace the target of a link, not the link
    with locked(path):
        there = _read(path)
        staying = {_row(r) for r in there if compared is not None and r.schedule() not in compared}
        every = (*there, *(record for record in found if _row(record) not in staying))
        measured = {_row(record): record for record in every if record.how == "measured"}
        known = {row[:2] for row in measured}
        modelled = {_row(r): r for r in every if r.how != "measured" and _row(r)[:2] not in known}
        rows = list((modelled | measured).values())
        save(path, rows)
        left_out = [record for record in found if record not in rows]
    return left_out


def remove(path: Path, is_meant: Callable[[Record], bool]) -> list[Record]:
    """Remove the records for which ``is_meant`` is true from the file, and return them."""
    if not os.path.lexists(path):
        return []
    path = path.resolve()
    with locked(path):
        there = _read(path)
        removed = [record for record in there if is_meant(record)]
        if removed:
            save(path, [record for record in there if record not in removed])
    return removed


def save(path: Path, found: Sequence[Record]) -> None:
    """Write the records to a file, sorted, atomically."""
    ordered = sorted(found, key=_row)
    write_text_atomic(path, "".join(_line(record) + "\n" for record in ordered))


def _row(record: Record) -> tuple[str, str, str]:
    return record.target, *record.key


def _line(record: Record) -> str:
    absent = {name for name in ("eager", "launches") if not getattr(record, name)}
    return record.model_dump_json(exclude=absent)


# The largest distance (``Workload.distance``) at which a record applies to another workload: the prefetch that speeds
# up a step at M = 4^10 slows it down at M = 4^5.
NEAR = 4.0


class Choice(BaseModel):
    """A schedule for a workload, and its source."""

    model_config = ConfigDict(frozen=True)

    schedule: Any
    source: str  # "record", "nearest: …" or "default"
    record: Record | None = None


def choose(
    workload: Workload, target: str, device: str, refused: Callable[[Schedule], str | None] = lambda schedule: None,
    among: Sequence[Record] | None = None,
) -> Choice:  # fmt: skip
    """Return the schedule of the exact record, else of the nearest valid one within ``NEAR``, else the default.

    Of equally near records, measured ones come first, then those of ``device``.

    Args:
        refused: returns why a schedule cannot be built on this machine, or None if it can.
        among: the records to choose from, of which those of other targets are ignored; None for all known ones.
    """

    def rank(record: Record) -> tuple[float, bool, bool, str]:
        modelled = record.how != "measured"
        return workload.distance(record.workload), modelled, record.device != device, record.workload.name

    candidates = [
        r
        for r in (known(target) if among is None else among)
        if r.target == target and workload.distance(r.workload) <= NEAR
    ]
    for record in sorted(candidates, key=rank):
        schedule = record.schedule()
        if schedule.refusal(workload) is None and refused(schedule) is None:
            exact = record.workload == workload and record.device in (device, target)  # the target's is modelled
            source = "record" if exact else f"nearest: {record.workload.name} on {record.device}"
            return Choice(schedule=schedule, source=source, record=record)
    return Choice(schedule=default_schedule(workload, target), source="default")
