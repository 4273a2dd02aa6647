"""An Optuna study of one workload's schedules, stored in a journal."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import socket
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from autotune.study.journal import open_journal
from autotune.study.space import Space
from autotune.study.trials import NOT_MEASURED, refuse_damaged
from lowering.gpu.offline import why_unsupported
from lowering.targets import find
from ramnet.files import locked
from schedules.base import Schedule
from schedules.kinds import default_schedule
from schedules.workload import Workload

if TYPE_CHECKING:
    import optuna
    from optuna.storages import JournalStorage

Sampler = Literal["tpe", "random"]
# Suggestions in a row without a new schedule, after which an untried schedule is drawn at random.
PATIENCE = 5
# A schedule during which this many processes were killed is refused, as it may be the cause.
MOST_KILLS = 2


class Study:
    """The trials of ``workload`` on one device under one fingerprint of the kernels; values are gains over the default.

    ``begin`` must be called before a search. It creates the study if the journal has none; nothing is written before.

    Trial 0 is the default schedule. Each trial has a ``status``, which is "ok", "refused", "duplicate", "interrupted"
    (by Ctrl-C), "killed", or a kind of failure, and an ``error`` message if it is not "ok". All changes are on disk
    when a method returns.

    Args:
        target: the target whose schedules are searched.
        identity: what else distinguishes results: device, threads, fingerprint.
        seconds_a_trial: the longest time of a trial, after which its process must have ended.
        storage: the open storage of the journal, if any, since reading 250 000 lines takes 15 s.

    Raises:
        ValueError: if the file is not a journal or is damaged.
        ImportError: if Optuna is not installed.
    """

    def __init__(
        self, journal: Path, workload: Workload, target: str, identity: str, sampler: Sampler = "tpe", seed: int = 0,
        seconds_a_trial: float = 300.0, storage: JournalStorage | None = None,
    ) -> None:  # fmt: skip
        self.workload, self.target = workload, target
        self.sampler, self.seed, self.seconds_a_trial = sampler, seed, seconds_a_trial
        self.space = Space(workload, target)
        self.valid = every_schedule(workload, target)
        self.storage = open_journal(journal) if storage is None else storage
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space = hashlib.sha256(repr(self.space.parameters).encode()).hexdigest()[:6]
        self.name = f"{workload.name} | {identity} | space {space}"
        if self.name in optuna.get_all_study_names(self.storage):
            self.optuna = optuna.load_study(storage=self.storage, study_name=self.name)
            try:
                refuse_damaged(self.optuna, self.space)
            except ValueError as error:
                raise ValueError(f"{journal}: {error}; name another file") from None
        self.lock = journal.with_name(f".{journal.name}.lock")

    def begin(self, *first: Schedule) -> None:
        """Take over trials of processes that have ended, and enqueue the default and ``first`` if they are untried."""
        import optuna

        with locked(self.lock):
            self.optuna = optuna.create_study(
                storage=self.storage, study_name=self.name, direction="maximize", load_if_exists=True
            )
            for trial in self._trials("RUNNING"):
                if not _alive(trial, self.seconds_a_trial):
                    self._end(trial, "killed", "its process ended before the trial did")
                    schedule = self.space.schedule(trial.params)
                    if schedule is not None and schedule not in self._given_up():
                        self.optuna.enqueue_trial(trial.params)
            untried = {*self.untried()}
            for schedule in (default_schedule(self.workload, self.target), *first):
                if schedule in untried:
                    self.optuna.enqueue_trial(self.space.chosen(schedule), skip_if_exists=True)

    def next(self) -> tuple[optuna.Trial, Schedule] | None:
        """Return a trial of an untried schedule, and the schedule; None if all were tried."""
        with locked(self.lock):  # so that two processes do not begin the same one
            for suggestions in itertools.count():
                untried, waiting = self.untried(), self._trials("WAITING")
                if not untried and not waiting:
                    return None
                if suggestions >= PATIENCE and untried and not waiting:
                    number = len(self.optuna.get_trials(deepcopy=False))
                    drawn = random.Random(self.seed + number).choice(untried)
                    self.optuna.enqueue_trial(self.space.chosen(drawn))
                trial, schedule = self._ask()
                refusal = refused(schedule, self.workload, self.target)
                if schedule in self._given_up():
                    refusal = f"{MOST_KILLS} processes were killed during its trials"
                same = self.finished().get(schedule) or self._under_way(schedule, trial.number)
                if refusal is not None:
                    self._end(trial, "refused", refusal)
                elif same is not None:
                    self._end(trial, "duplicate", f"of trial {same.number}", same.value)
                else:
                    return trial, schedule
        raise AssertionError

    def succeed(self, trial: optuna.Trial, gain: float, **details: Any) -> None:
        """Finish a trial with its ``gain``, the default's time divided by the trial's."""
        self._end(trial, "ok", "", gain, **details)

    def fail(self, trial: optuna.Trial, status: str, error: str) -> None:
        """Finish a trial as failed."""
        self._end(trial, status, error)

    def interrupt(self, trial: optuna.Trial) -> None:
        """Mark a trial as interrupted; the next search begins with it."""
        self._end(trial, "interrupted", "the search was stopped")
        self.optuna.enqueue_trial(trial.params)

    def finished(self) -> dict[Schedule, optuna.trial.FrozenTrial]:
        """Return the first conclusive trial of each schedule."""
        found: dict[Schedule, optuna.trial.FrozenTrial] = {}
        for trial in self._trials("COMPLETE", "FAIL"):
            schedule = self.space.schedule(trial.params)
            if schedule is not None and trial.user_attrs.get("status", "killed") not in NOT_MEASURED:
                found.setdefault(schedule, trial)
        return found

    def untried(self) -> list[Schedule]:
        """Return the valid schedules that are neither finished nor running."""
        taken = {*self.finished(), *(self.space.schedule(trial.params) for trial in self._trials("RUNNING"))}
        return [schedule for schedule in self.valid if schedule not in taken | self._given_up()]

    def best(self, count: int) -> list[Schedule]:
        """Return the ``count`` best schedules by gain, excluding the default."""
        default = default_schedule(self.workload, self.target)
        ok = [(t.value, s) for s, t in self.finished().items() if t.value is not None and s != default]
        return [schedule for _, schedule in sorted(ok, key=lambda pair: -pair[0])[:count]]

    def seconds(self, schedule: Schedule) -> float:
        """Return the measured seconds of a call; 0 if it was not measured."""
        trial = self.finished().get(schedule)
        return 0.0 if trial is None else float(trial.user_attrs.get("seconds", 0.0))

    def summary(self) -> Summary:
        """Return a summary of the search."""
        finished = list(self.finished().values())
        gains = [trial.value for trial in finished if trial.value is not None]
        reasons = Counter(trial.user_attrs["status"] for trial in self._trials("COMPLETE", "FAIL", "PRUNED"))
        return Summary(len(finished), max(gains, default=1.0), dict(reasons))

    def _ask(self) -> tuple[optuna.Trial, Schedule]:
        trial = self.optuna.ask()
        # Each trial has a sampler seeded by its number, so that a resumed search equals an uninterrupted one.
        self.optuna.sampler = self._sampler((self.seed * 100_003 + trial.number) % 2**32)
        trial.set_user_attr("owner", {"host": socket.gethostname(), "pid": os.getpid(), "began": _birth(os.getpid())})
        return trial, self.space.suggest(trial)

    def _under_way(self, schedule: Schedule, number: int) -> optuna.trial.FrozenTrial | None:
        """Return a running trial of the same schedule in another process."""
        others = (trial for trial in self._trials("RUNNING") if trial.number != number)
        return next((trial for trial in others if self.space.schedule(trial.params) == schedule), None)

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def _end(self, trial: Any, status: str, error: str, value: float | None = None, **details: Any) -> None:
        """Finish a trial, of this process or another. Nothing happens if it has ended: another machine, whose clock
        may differ, takes over a trial that lasts too long."""
        import optuna

        State = optuna.trial.TrialState
        state = State.PRUNED if status == "refused" else State.FAIL if value is None else State.COMPLETE
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            for name, each in (*details.items(), ("status", status), ("error", error)):
                self.storage.set_trial_user_attr(trial._trial_id, name, each)
            self.optuna.tell(trial.number, value, state=state, skip_if_finished=True)

    def _given_up(self) -> set[Schedule | None]:
        killed = (trial for trial in self._trials("FAIL") if trial.user_attrs.get("status") == "killed")
        counts = Counter(self.space.schedule(trial.params) for trial in killed)
        return {schedule for schedule, count in counts.items() if count >= MOST_KILLS}

    def _trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.optuna.get_trials(deepcopy=False) if trial.state.name in states]


def every_schedule(workload: Workload, target: str) -> list[Schedule]:
    """Return the schedules of the ``Space`` that are not ``refused``."""
    return [each for each in Space(workload, target).schedules() if refused(each, workload, target) is None]


def refused(schedule: Schedule, workload: Workload, target: str) -> str | None:
    """Return why a schedule cannot be built: it is not valid, or its compiler does not support the GPU; else None."""
    if find(target).gpu is None:
        return schedule.refusal(workload)
    return schedule.refusal(workload) or why_unsupported(schedule, target, workload)


class Summary(NamedTuple):
    """A summary of a search: measured schedules (including failures), the best gain, and trials by status."""

    trials: int
    best: float
    statuses: dict[str, int]

    @property
    def failures(self) -> dict[str, int]:
        """The numbers of failed trials by reason."""
        return {status: count for status, count in self.statuses.items() if status not in ("ok", *NOT_MEASURED)}


def _birth(pid: int) -> float | None:
    """Return the start time of a process on this machine; None if there is none."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _alive(trial: optuna.trial.FrozenTrial, seconds: float) -> bool:
    """Return whether the process that runs a trial is still alive, as far as this machine can tell."""
    owner = trial.user_attrs.get("owner")
    if owner is not None and owner["began"] is not None and owner["host"] == socket.gethostname():
        birth = _birth(owner["pid"])
        return birth is not None and abs(birth - owner["began"]) < 5  # the system's clock may have been set
    begun = trial.datetime_start
    return begun is not None and time.time() - begun.timestamp() < seconds
