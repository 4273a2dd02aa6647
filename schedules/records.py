"""Tuned records: for each workload and device the best schedule found, one JSON row a line, sorted.

What tuning finds goes to a folder of the user's. The records beside this module are shipped: they are only read, for
workloads and devices of which the user's folder has none.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ramnet.config import one_line
from ramnet.files import locked, read_text, write_text_atomic
from schedules.base import Schedule
from schedules.kinds import default_schedule, schedule_of
from schedules.workload import Workload

How = Literal["measured", "modelled, not run"]  # modelled: compiled for the target
SHIPPED = Path(__file__).parent / "records"
# 25 000 rows. Each process that uses a target reads its file whole, which takes 1.5 s for so many.
MOST_BYTES = 1 << 24


class Time(BaseModel):
    """Seconds of one call: the median and the interquartile range of ``runs`` interleaved samples.

    What a model says has no spread, and no runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    median: float
    spread: float
    runs: int


class Launch(BaseModel):
    """What the binary of one launch of a schedule needs: see ``lowering.gpu.resources.Resources``."""

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
    gain: float  # the default's time over this one's, median of paired rounds; 1 where the default stays
    gain_spread: float
    tuned: Time
    default: Time
    eager: Time | None = None  # modelled: nothing was run
    trials: int
    fingerprint: str  # of the kernels' source and the compilers' versions
    versions: dict[str, str]
    date: str
    launches: tuple[Launch, ...] = ()  # of a GPU's schedule, where it was compiled apart from running it

    @property
    def key(self) -> tuple[str, str]:
        return self.workload.name, self.device

    def schedule(self) -> Schedule:
        """The knobs, validated."""
        return schedule_of(self.workload.op, self.target, self.knobs)


def records_path(target: str) -> Path:
    """The user's file of a target: in ``RAMNET_RECORDS`` where that is set, else in the user's folder for data.

    ValueError where that is something other than a folder.
    """
    folder = records_folder()
    if os.path.lexists(folder) and not folder.is_dir():
        named = f"RAMNET_RECORDS is {folder}, which" if os.environ.get("RAMNET_RECORDS") else str(folder)
        raise ValueError(f"{named} is not a folder; it must name the folder of the records")
    return folder / f"{target}.jsonl"


def records_folder() -> Path:
    """Where the user's records are, or will be."""
    import platformdirs

    given = os.environ.get("RAMNET_RECORDS")
    return Path(given) if given else platformdirs.user_data_path("ramnet", appauthor=False) / "records"


def shipped_path(target: str) -> Path:
    """The file of a target's shipped records."""
    return SHIPPED / f"{target}.jsonl"


def known(target: str, path: Path | None = None) -> list[Record]:
    """The records of the user's file of a target, or of ``path``; and those shipped for other workloads and devices.

    ValueError as for ``records_path`` and ``load``.
    """
    found = {record.key: record for record in load(shipped_path(target))}
    found.update((record.key, record) for record in load(records_path(target) if path is None else path))
    return list(found.values())


def load(path: Path) -> list[Record]:
    """The records of a file, none where there is no file; ValueError, naming the line, for anything else in it."""
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
            record.schedule()
        except ValidationError as error:
            raise ValueError(f"{path}, line {number}, is not a record: {one_line(error)}") from None
        except ValueError as error:  # an op that the target has no kernel for
            raise ValueError(f"{path}, line {number}, is not a record: {error}") from None
        records.append(record)
    return records


def merge(path: Path, found: Sequence[Record], compared: Collection[Schedule] | None = None) -> list[Record]:
    """Put ``found`` in the file, each in the place of its workload and device; several processes may do so at once.

    A workload that was measured, on whatever device, has no modelled row.

    Args:
        compared: the schedules that ``found`` was compared with; a row with another one stays as it is. None where
            each row gives way.

    Returns:
        Those of ``found`` that a row stays in the place of.
    """
    path = path.resolve()  # where it is a link, the file that it names
    with locked(path):
        there = _read(path)
        staying = {r.key for r in there if compared is not None and r.schedule() not in compared}
        left_out = [record for record in found if record.key in staying and record not in there]
        every = (*there, *(record for record in found if record.key not in staying))
        measured = {record.key: record for record in every if record.how == "measured"}
        known = {workload for workload, _ in measured}
        modelled = {record.key: record for record in every if record.how != "measured" and record.key[0] not in known}
        rows = modelled | measured
        save(path, list(rows.values()))
    return left_out


def remove(path: Path, is_meant: Callable[[Record], bool]) -> list[Record]:
    """Take the records that are meant out of the file, and give them."""
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
    """Write a file of these records, sorted, whole or not at all."""
    ordered = sorted(found, key=lambda record: (record.target, record.key))
    write_text_atomic(path, "".join(_line(record) + "\n" for record in ordered))


def _line(record: Record) -> str:
    absent = {name for name in ("eager", "launches") if not getattr(record, name)}
    return record.model_dump_json(exclude=absent)


# A record says little of a workload further away than this many doublings of a size: at M = 4^5 a step loses by the
# prefetch that it gains by at M = 4^10.
NEAR = 4.0


class Choice(BaseModel):
    """A schedule for a workload, and where it comes from."""

    model_config = ConfigDict(frozen=True)

    schedule: Any
    source: str  # "record", "nearest: …" or "default"
    record: Record | None = None


def choose(
    workload: Workload, target: str, device: str, refused: Callable[[Schedule], str | None] = lambda schedule: None,
    among: Sequence[Record] | None = None,
) -> Choice:  # fmt: skip
    """The schedule of the exact record, else of the nearest one near enough that can be built, else the default.

    ``refused`` says why a schedule cannot be built on this machine, or None. Of equally near ones those that were
    measured come first, then those of ``device``. Other targets' records, whose knobs are other kernels', are passed
    over. ``among``: the records to choose from; those known of the target where it is None.
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
            exact = record.key == (workload.name, device)
            source = "record" if exact else f"nearest: {record.workload.name} on {record.device}"
            return Choice(schedule=schedule, source=source, record=record)
    return Choice(schedule=default_schedule(workload, target), source="default")
