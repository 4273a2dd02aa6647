"""The search: which schedules are tried, in what order, and what survives interruptions."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from autotune.study.study import MOST_KILLS, Study
from schedules.base import Schedule
from schedules.cpu import MemoryScan
from schedules.gpu import SCHEDULES
from schedules.workload import Workload
from tests.samples import full_disk

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")

CONSTANTS = {"decay_power": 1.0, "eps": 1e-6}
# Few schedules, some of them refused: a tile of 8 does not divide D / groups where groups is 2 or 4.
WORKLOAD = Workload(op="memory_scan", shape={"N": 1, "T": 4, "K": 1, "M": 8, "D": 8}, constants=CONSTANTS)
DEFAULT = MemoryScan.default(WORKLOAD)
SPACE = MemoryScan.space(WORKLOAD)
COMBINATIONS = [MemoryScan(**dict(zip(SPACE, values, strict=True))) for values in itertools.product(*SPACE.values())]
VALID = [schedule for schedule in COMBINATIONS if schedule.refusal(WORKLOAD) is None]


def gain(schedule: Schedule) -> float:
    """Return a fictitious gain, different for every schedule."""
    return 1 + zlib.crc32(schedule.model_dump_json().encode()) / 2**32


def study(folder: Path, **options: Any) -> Study:
    return Study(folder / "journal.log", WORKLOAD, "cpu", "a device", **options)


def search(found: Study, most: int = 1000) -> list[Schedule]:
    """Try all schedules, or the first ``most``, and return them."""
    found.begin()
    tried: list[Schedule] = []
    while len(tried) < most and (suggestion := found.next()) is not None:
        trial, schedule = suggestion
        found.succeed(trial, gain(schedule))
        tried.append(schedule)
    return tried


def test_trial_0_is_the_default_and_known_schedules_come_next(tmp_path: Path) -> None:
    found = study(tmp_path)
    good = VALID[-1]
    assert good != DEFAULT
    found.begin(good)
    first, second = found.next(), found.next()
    assert first is not None and second is not None
    assert (first[0].number, first[1]) == (0, DEFAULT)
    assert second[1] == good


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_valid_combination_is_measured_once(tmp_path: Path, sampler: Any) -> None:
    found = study(tmp_path, sampler=sampler)
    tried = search(found)
    assert len(tried) == len(VALID) < len(COMBINATIONS)
    assert set(tried) == set(VALID)
    assert found.best(2)[0] == max((s for s in VALID if s != DEFAULT), key=gain)


def test_refused_combinations_are_pruned_and_duplicates_have_the_value_of_the_first(tmp_path: Path) -> None:
    found = study(tmp_path, sampler="random")
    search(found)
    trials = found.optuna.get_trials()
    refused = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert refused
    assert {trial.user_attrs["status"] for trial in refused} == {"refused"}
    assert all("does not divide D / groups" in trial.user_attrs["error"] for trial in refused)
    duplicates = [trial for trial in trials if trial.user_attrs["status"] == "duplicate"]
    assert duplicates
    for trial in duplicates:
        first = trials[int(trial.user_attrs["error"].split()[-1])]
        assert (trial.params, trial.value) == (first.params, first.value)


def test_failures_are_stored_and_not_tried_again(tmp_path: Path) -> None:
    found = study(tmp_path)
    found.begin()
    suggestion = found.next()
    assert suggestion is not None
    found.fail(suggestion[0], "crash", "signal 11")
    again = study(tmp_path)
    assert suggestion[1] not in search(again)
    assert again.summary().failures == {"crash": 1}
    assert again.optuna.trials[0].user_attrs["error"] == "signal 11"
    assert again.summary().trials == len(VALID)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_seed_gives_the_same_order_also_when_the_search_is_resumed(tmp_path: Path, sampler: Any) -> None:
    orders = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        orders[name] = search(study(tmp_path / name, sampler=sampler, seed=seed), most=18)
    assert orders["one"] == orders["same"] != orders["other"]
    (tmp_path / "parts").mkdir()
    parts = [search(study(tmp_path / "parts", sampler=sampler, seed=1), most=6) for _ in range(3)]
    assert [schedule for part in parts for schedule in part] == orders["one"]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(tmp_path: Path, sampler: Any, seed: int) -> None:
    assert len(search(study(tmp_path, sampler=sampler, seed=seed), most=5)) == 5


def search_and_hang(folder: Path, trials: int, connection: Connection) -> None:
    found = study(folder)
    search(found, most=trials)
    found.next()
    connection.send("under way")
    connection.recv()


def run_until_killed(folder: Path, trials: int) -> None:
    """Run another process that finishes ``trials`` trials and begins one more, during which kill -9 ends it."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=search_and_hang, args=(folder, trials, theirs))
    process.start()
    theirs.close()
    assert mine.recv() == "under way"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_after_kill_9_the_search_repeats_the_interrupted_trial(tmp_path: Path) -> None:
    run_until_killed(tmp_path, trials=5)
    found = study(tmp_path)
    assert found.summary().trials == 5
    (cut_off,) = found._trials("RUNNING")
    tried = search(found)
    assert tried[0] == found.space.schedule(cut_off.params)
    assert len(tried) == len(VALID) - 5
    assert not found._trials("RUNNING")
    assert found.summary().statuses["killed"] == 1


def test_a_schedule_that_keeps_killing_its_process_is_given_up(tmp_path: Path) -> None:
    for _ in range(MOST_KILLS):
        run_until_killed(tmp_path, trials=0)
    tried = search(study(tmp_path))
    assert DEFAULT not in tried
    assert len(tried) == len(VALID) - 1


def test_a_trial_of_a_running_process_is_not_taken_over(tmp_path: Path) -> None:
    mine, other = study(tmp_path), study(tmp_path)
    mine.begin()
    suggestion = mine.next()
    assert suggestion is not None
    assert suggestion[1] not in search(other)
    mine.succeed(suggestion[0], 1.0)
    assert mine.summary().statuses["ok"] == len(VALID)


@pytest.mark.parametrize(("seconds", "killed"), [(1e9, 0), (0.0, 1)])
@pytest.mark.parametrize(("name", "told"), [("socket.gethostname", "elsewhere"), ("autotune.study.study._birth", None)])
def test_a_trial_of_an_unknown_process_is_taken_over_after_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str | None, seconds: float, killed: int
) -> None:
    other = study(tmp_path)
    other.begin()
    with monkeypatch.context() as patched:
        patched.setattr(name, lambda *_: told)
        suggestion = other.next()
    assert suggestion is not None
    mine = study(tmp_path, seconds_a_trial=seconds)
    assert (suggestion[1] in search(mine)) == bool(killed)
    assert mine.summary().statuses.get("killed", 0) == killed


def test_a_trial_that_another_machine_took_over_ends_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = study(tmp_path)
    mine.begin()
    taken = [mine.next() for _ in range(3)]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        study(tmp_path, seconds_a_trial=0.0).begin()
    first, second, third = (each[0] for each in taken if each is not None)
    mine.succeed(first, 1.5, seconds=1.0)
    mine.fail(second, "crash", "")
    mine.interrupt(third)
    statuses = mine.summary().statuses
    assert statuses["killed"] == 3 and not {"ok", "crash", "interrupted"} & statuses.keys()


def search_in(folder: Path, most: int) -> list[str]:
    return [schedule.model_dump_json() for schedule in search(study(folder), most)]


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        tried = pool.starmap(search_in, [(tmp_path, 1000)] * 2)
    found = study(tmp_path)
    assert len(tried[0]) + len(tried[1]) == len(set(tried[0]) | set(tried[1])) == len(VALID)
    assert len(found.finished()) == len(VALID)
    numbers = [trial.number for trial in found.optuna.trials]
    assert numbers == list(range(len(numbers)))


def note(folder: Path, process: int) -> None:
    found = study(folder)
    for i in range(100):
        found.optuna.set_user_attr(f"{process}, {i}", 0)


def test_concurrent_writes_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    study(tmp_path).begin()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(note, [(tmp_path, process) for process in range(4)])
    assert len(study(tmp_path).optuna.user_attrs) == 400


def test_missing_folders_are_made(tmp_path: Path) -> None:
    assert len(search(study(tmp_path / "new" / "folder"), most=1)) == 1


def test_an_incomplete_first_line_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text('{"op_code":0,"worker_id":"x","stud')
    assert len(search(study(tmp_path))) == len(VALID)


@pytest.mark.parametrize("length", [10, 100_000])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, length: int) -> None:
    search(study(tmp_path), most=3)
    journal = tmp_path / "journal.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":"' + b"x" * length)
    assert len(search(study(tmp_path))) == len(VALID) - 3
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_full_disk_leaves_the_journal_intact(tmp_path: Path) -> None:
    search(study(tmp_path), most=3)
    journal = tmp_path / "journal.log"
    found = study(tmp_path)
    with full_disk(after=journal.stat().st_size + 150), pytest.raises(OSError):
        search(found)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert study(tmp_path).summary().trials == 3


def test_changes_are_on_disk_when_a_method_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    synced: dict[int, int] = {}
    monkeypatch.setattr(os, "fsync", sync)
    found = study(tmp_path)
    journal = tmp_path / "journal.log"
    for method in (found.begin, found.next, found.next, found.next):
        trial = method()
        assert synced == {journal.stat().st_ino: journal.stat().st_size}
    ends = (
        lambda: found.succeed(trial[0], 1.0),
        lambda: found.fail(trial[0], "crash", ""),
        lambda: found.interrupt(trial[0]),
    )
    for end in ends:
        trial = found.next()
        end()
        assert synced == {journal.stat().st_ino: journal.stat().st_size}


def test_a_trial_has_only_the_knobs_of_its_form(tmp_path: Path) -> None:
    shape = {"N": 2, "T": 64, "K": 8, "M": 64, "D": 32}
    work = Workload(op="memory_scan_backward", shape=shape, dtype="bfloat16", constants=CONSTANTS)
    found = Study(tmp_path / "journal.log", work, "a100", "a device", sampler="random")
    found.begin()
    for _ in range(15):
        suggestion = found.next()
        assert suggestion is not None
        trial, schedule = suggestion
        form = schedule.form  # type: ignore[attr-defined]
        names = {f"{form}.{knob}" for knob in schedule.model_dump() if knob != "form"}
        assert found.optuna.get_trials()[trial.number].params.keys() == {"form"} | names
        assert type(schedule) is SCHEDULES[work.op][form] and schedule.refusal(work) is None
        found.succeed(trial, gain(schedule))
    assert {schedule.form for schedule in found.finished()} == {"slots", "shared"}  # type: ignore[attr-defined]
    assert len(set(found.valid)) == len(found.valid) > len(found.finished()) == 15
