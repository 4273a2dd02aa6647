"""Known schedules are compared with what a tuning run finds, and stay unless that is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune import report
from autotune.measure.timing import Timing
from autotune.study.tuner import displaced_by
from autotune.study.worker import FailedError
from lowering import targets
from lowering.fingerprint import stale
from schedules import records
from schedules.base import Schedule
from schedules.cpu import AddressDecodeBackward
from schedules.records import Record, Time
from schedules.workload import Workload
from tests.autotune.faulty import WORKLOAD, Synthetic
from tests.autotune.study.tuning import BEST, DEFAULT, run

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
pytest.importorskip("tvm", reason="tuning for the CPU needs tvm: pip install 'ramnet[tvm]'")


def test_the_recorded_schedule_is_tried_right_after_the_default(tmp_path: Path) -> None:
    def gain(schedule: Schedule) -> float:
        return 2.0 if schedule == BEST else 1.0

    run(tmp_path, Synthetic(gain))
    (tmp_path / "journal.log").unlink()
    again = Synthetic(gain)
    (result,) = run(tmp_path, again, trials=2)
    assert again.tried[1:] == [DEFAULT, BEST]
    assert result.record.schedule() == BEST


def near(rows: int, lanes: int, **changes: Any) -> Record:
    """A record of a workload with ``rows`` rows."""
    time = Time(median=1e-6, spread=0.0, runs=9)
    return Record(
        workload=WORKLOAD.model_copy(update={"shape": {**WORKLOAD.shape, "R": rows}}), target="cpu", device="here",
        knobs={"lanes": lanes, "parallel": False}, how="measured", gain=1.0, gain_spread=0.0, tuned=time, default=time,
        eager=time, trials=1, fingerprint="", versions={}, date="2026-01-01",
    ).model_copy(update=changes)  # fmt: skip


def test_a_record_would_replace_its_own_schedule_and_the_one_that_is_currently_used() -> None:
    def lanes(*known: Record) -> list[int]:
        found = displaced_by(WORKLOAD, known, "cpu", "here")
        return [schedule.lanes for schedule in found]  # type: ignore[attr-defined]

    assert lanes(near(512, 4, device="elsewhere"), near(512, 8)) == [8]
    assert lanes(near(256, 8), near(4096, 32)) == [8], "the nearest one is used where there is none of its own"
    assert lanes(near(512, 4, device="elsewhere"), near(256, 8)) == [4]
    assert lanes(near(512, 999), near(256, 8)) == [999, 8], "its own cannot be built"
    assert lanes(near(512, DEFAULT.lanes, knobs=DEFAULT.model_dump())) == [], "the default is tried anyway"
    assert lanes(near(16384, 8)) == [], "five doublings away is not used"
    other_op = WORKLOAD.model_copy(update={"op": "address_decode"})
    assert lanes(near(512, 4, workload=other_op, knobs={"lanes": 4, "unroll": 1, "parallel": False})) == []
    assert lanes(near(512, 4, target="a100", knobs={})) == []


def known(folder: Path, schedule: Schedule = BEST, **changes: Any) -> Record:
    """A record of the workload on this machine, of other code, in the file that is tuned into."""
    record = near(512, 8, device=targets.cpu_name(), knobs=schedule.model_dump(), **changes)
    records.merge(folder / "records.jsonl", [record])
    return record


def test_the_known_best_is_tried_with_however_few_trials_and_stays(tmp_path: Path) -> None:
    known(tmp_path)
    worker = Synthetic(lambda schedule: 1.6 if schedule == BEST else 1.0)
    (result,) = run(tmp_path, worker, trials=1)
    assert worker.tried[1:] == [DEFAULT, BEST]
    (record,) = records.load(tmp_path / "records.jsonl")
    assert (record, record.schedule(), record.gain) == (result.record, BEST, 1.6)
    assert stale(record) is None, "it was measured anew"


@pytest.mark.parametrize("gain", [0.9, 1.0, 1.02])
def test_within_the_noise_the_known_best_stays(tmp_path: Path, gain: float) -> None:
    class Noisy(Synthetic):
        def measure(self, candidates: Any, rounds: int, seconds: float) -> dict[str, Timing]:
            def seconds_of(schedule: Schedule | None, i: int) -> float:
                if schedule in (BEST, None):
                    return 1e-3
                # The others are faster by 2 % in the median, but in fewer than three of four rounds.
                return 1e-3 / 1.02 if gain > 1 and i % 5 < 3 else 1.1e-3

            return {
                name: Timing(tuple(seconds_of(schedule, i) for i in range(rounds)), rounds)
                for name, schedule in candidates.items()
            }

    known(tmp_path)
    (result,) = run(tmp_path, Noisy(None))
    assert result.record.schedule() == BEST


@pytest.mark.parametrize("better", [DEFAULT, AddressDecodeBackward(lanes=32, parallel=False)])
def test_what_is_faster_than_the_known_best_replaces_it(tmp_path: Path, better: Schedule) -> None:
    known(tmp_path)
    run(tmp_path, Synthetic(lambda schedule: 2.0 if schedule == better else 1.0))
    (record,) = records.load(tmp_path / "records.jsonl")
    assert record.schedule() == better


@pytest.mark.parametrize(("status", "stays"), [("wrong_result", False), ("crash", False), ("build_timeout", True)])
def test_a_known_best_that_fails_is_replaced_unless_it_ran_out_of_time(
    tmp_path: Path, status: str, stays: bool
) -> None:
    class Fails(Synthetic):
        def try_out(self, schedule: Schedule) -> None:
            super().try_out(schedule)
            if schedule == BEST:
                raise FailedError(status, "in vain")

    before = known(tmp_path)
    (result,) = run(tmp_path, Fails(lambda schedule: 1.0), trials=2)
    assert (records.load(tmp_path / "records.jsonl") == [before]) == stays == result.kept
    assert bool(report.notes([result])) == stays


def test_a_known_best_outside_the_knobs_that_are_searched_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AddressDecodeBackward, "space", lambda workload: {"lanes": (4, 16), "parallel": (False,)})
    known(tmp_path)
    worker = Synthetic(lambda schedule: 1.6 if schedule == BEST else 1.0)
    run(tmp_path, worker)
    assert BEST in worker.tried
    (record,) = records.load(tmp_path / "records.jsonl")
    assert (record.schedule(), record.gain) == (BEST, 1.6)


def test_a_record_of_another_process_stays_if_it_was_not_compared(tmp_path: Path) -> None:
    class Meanwhile(Synthetic):
        def open(self, workload: Workload, target: str) -> None:
            super().open(workload, target)
            known(tmp_path)

    (result,) = run(tmp_path, Meanwhile(lambda schedule: 1.0), trials=1)
    (record,) = records.load(tmp_path / "records.jsonl")
    assert (record.schedule(), result.kept) == (BEST, True)


def test_measured_replaces_modelled_and_not_the_reverse(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    (result,) = run(tmp_path, Synthetic(lambda schedule: 2.0 if schedule == BEST else 1.0))
    modelled = result.record.model_copy(update={"how": "modelled, not run", "knobs": DEFAULT.model_dump()})
    records.merge(path, [modelled])
    assert records.load(path) == [result.record]
    path.unlink()
    records.merge(path, [modelled])
    run(tmp_path, Synthetic(lambda schedule: 2.0 if schedule == BEST else 1.0))
    assert records.load(path)[0].how == "measured"
