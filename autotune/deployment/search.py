"""An Optuna search with two goals: the time of a token, and how well the model still predicts.

A token reads all weights once, so the time of that, the floor, tells what to try: precisions from the fewest bytes on,
after the first one, which is likely to be allowed. A group of deployments that loses too much, or whose floor is above
a time that was measured, is not searched further. Nothing begins that is not expected to end within the budget.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from pydantic import ValidationError

from autotune.deployment import costs
from autotune.deployment.costs import Costs, Part, Progress
from autotune.deployment.stored import Stored
from autotune.deployment.trial import BASE, COMPILED, UNTUNED, Answer, Measured, Request, Trials
from autotune.study.journal import open_journal
from autotune.study.worker import LONGEST_LIMIT, FailedError, OutOfTimeError, Process
from lowering.targets import cpu_name
from ramnet.config import one_line
from schedules.deployment import AnyDeployment, DeploymentRecord, Point, digest, front

# The constraint: the chosen deployment predicts at most this much worse than float32, relative to its bits a token.
MOST_LOSS = 0.005
_PATIENCE = 5
# It loses 0.14 % at most in all models that were measured, random weights among them, and int4 0.8 %.
_FIRST = "int8"
# What prompts take with another setting, at most, over the default's: a longer block needs more memory, too.
_WORTH = 0.97


class Search:
    """A search for one model on this CPU.

    Args:
        stored: the model.
        journal: the file of all trials, which a later run resumes.
        bandwidth: bytes/s that the CPU reads weights with.
        budget: the seconds of the search.
    """

    def __init__(
        self, stored: Stored, journal: Path, *, seed: int, bandwidth: float, budget: Costs,
        on_progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.stored, self.space, self.seed, self.bandwidth, self.costs = stored, stored.space, seed, bandwidth, budget
        self.on_progress = on_progress
        self.process = Process(Trials)
        self.parts = [costs.AGAIN, *(part for part, _, _ in self.space.prompts), costs.AGAINST]  # of ``finish``
        self.fingerprint = self.space.fingerprint()
        model = f"{digest(stored.config)} {stored.digest}"
        name = f"deployment {model} | {cpu_name()} | {self.space.threads} | {self.fingerprint}"
        self.study = optuna.create_study(
            storage=open_journal(journal), study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
        self._refuse_damaged(journal)
        for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process was killed

    def _refuse_damaged(self, journal: Path) -> None:
        """Raise ValueError, with the trial, if one is not as ``run`` leaves it."""
        for trial in self._ended():
            try:
                self._deployment(trial)
                if "point" in trial.user_attrs:
                    Point.model_validate_json(trial.user_attrs["point"])
                if not isinstance(trial.user_attrs.get("error", ""), str):
                    raise ValueError(f"error is {trial.user_attrs['error']!r}; it must be a text")
            except (TypeError, ValueError) as error:
                why = one_line(error) if isinstance(error, ValidationError) else error
                raise ValueError(
                    f"{journal}: trial {trial.number} is damaged: {why}; choose another --output"
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def defaults(self) -> dict[str, AnyDeployment]:
        """Return the default of each group in the order in which they are tried."""
        every = sorted(self.space.defaults(), key=lambda default: default.precision != _FIRST)
        return {default.group: default for default in every}

    def run(self) -> None:
        """Try deployments, the default of each group first, while another one and the comparisons of ``finish``
        are expected to end in time."""
        import optuna

        every = self.space.every()
        while left := self._left(every):
            begin, default = perf_counter(), left[0] in self.defaults().values()
            reserve = self._expected(costs.AGAIN) if self._best() < inf else 0.0
            if self.costs.left() <= self.costs.of_trial(default) + reserve:
                break
            self.process.deadline = self.costs.end - reserve
            trial, deployment = self._next(left)
            self.on_progress(self.progress(str(deployment)))
            try:
                point = self._measure(deployment)
            except FailedError as error:
                if not isinstance(error, OutOfTimeError):  # which says nothing about the deployment
                    trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                trial.set_user_attr("point", point.model_dump_json())
                self.study.tell(trial, [point.seconds, point.loss])
            self.costs.trial[default] = perf_counter() - begin

    def _left(self, every: list[AnyDeployment]) -> list[AnyDeployment]:
        """Return untried deployments of the groups that are worth it: only defaults, while there are some."""
        tried, losses, best = self.tried(), self.losses(), self._best()
        defaults, sizes = self.defaults(), self.space.sizes
        failed = {group for group, default in defaults.items() if default in tried and group not in losses}
        worth = {
            group: default for group, default in defaults.items()
            if group not in failed and losses.get(group, 0) <= MOST_LOSS
            and sizes[default.precision] / self.bandwidth < best
        }  # fmt: skip
        first = [default for default in worth.values() if default not in tried]
        return first or [each for each in every if each.group in worth and each not in tried]

    def _next(self, left: list[AnyDeployment]) -> tuple[Any, AnyDeployment]:
        """Return a trial of the first of ``left`` if it is a default, else of one of them that Optuna suggests."""
        import optuna

        drawn = left[0]
        if drawn not in self.defaults().values():
            tried = len(self.study.get_trials(deepcopy=False))
            drawn = random.Random(self.seed + tried).choice(left)
            self.study.sampler = optuna.samplers.TPESampler(seed=(self.seed * 100_003 + tried) % 2**32)
            for _ in range(_PATIENCE):
                trial, found = self._trial(drawn.model_dump(include=set(drawn.files)))
                if found in left:
                    return trial, found
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return self._trial(drawn.model_dump())

    def _trial(self, knobs: dict[str, Any]) -> tuple[Any, AnyDeployment]:
        """Return a trial with these knobs, to which Optuna adds the others."""
        self.study.enqueue_trial(knobs)
        trial = self.study.ask()
        return trial, self.space.suggest(trial)

    def _measure(self, deployment: AnyDeployment) -> Point:
        """Measure a deployment beside the default of its group, whose time and loss are known, or are measured."""
        default, losses = self.defaults()[deployment.group], self.losses()
        seconds = self.costs.timing(costs.TRIAL)
        if deployment == default:
            answer = self.ask({}, base=default, rounds=9, seconds=seconds, judge=True)
            assert answer.bits is not None
            bits, exact = answer.bits
            if exact == 0:  # a vocabulary of one token
                bits, exact = bits + 1, 1
            loss = bits / exact - 1
            seconds = answer.times[BASE].seconds
        else:
            answer = self.ask({"it": deployment}, base=default, rounds=9, seconds=seconds)
            known = next(point for point in self.tried_points() if point.deployment == default)
            seconds, loss = known.seconds * answer.times["it"].ratio, losses[deployment.group]
        size = self.space.sizes[deployment.precision]
        return Point(deployment=deployment, seconds=seconds, loss=loss, size=size)

    def finish(self) -> DeploymentRecord:
        """Measure the best together, choose among them, tune prompts of the chosen one, and compare it with the
        space's baseline, as far as there is time.

        Raises:
            RuntimeError: if no deployment that loses little could be measured, with the first error.
            FailedError: if one cannot be measured again.
        """
        points = {point.deployment: point for point in self.tried_points()}
        allowed = sorted((p for p in points.values() if p.loss <= MOST_LOSS), key=lambda p: p.seconds)
        if not allowed:
            raise RuntimeError(self._nothing())
        names = [BASE, *map(str, range(1, costs.FINALISTS))]
        finalists = dict(zip(names, (point.deployment for point in allowed), strict=False))
        fastest = finalists[BASE]
        others = {name: deployment for name, deployment in finalists.items() if name != BASE}
        times = self._compare(costs.AGAIN, others, base=fastest, rounds=25)
        for name, measured in times.items():
            points[finalists[name]] = points[finalists[name]].model_copy(update={"seconds": measured.seconds})
        fastest = finalists[min(times, key=lambda name: times[name].ratio, default=BASE)]
        chosen, prompt = self._for_prompts(fastest)
        point = points.pop(fastest).model_copy(update={"deployment": chosen})
        baseline = self.space.baseline
        others, gain_over = ({}, COMPILED) if baseline is None else ({UNTUNED: baseline}, UNTUNED)
        times = self._compare(
            costs.AGAINST, others, base=point.deployment, rounds=25, compiled=gain_over == COMPILED
        )  # fmt: skip
        over = times.get(gain_over)
        if over:
            point = point.model_copy(update={"seconds": times[BASE].seconds})
        return DeploymentRecord(
            model=digest(self.stored.config), device=cpu_name(), chosen=point,
            gain=over.ratio if over else None, gain_spread=over.spread if over else None, gain_over=gain_over,
            judged_by=self.stored.judged_by, most_loss=MOST_LOSS, front=front([*points.values(), point]),
            trials=len(self.tried_points()), prompt_seconds=prompt, fingerprint=self.fingerprint,
            date=datetime.now(UTC).date().isoformat(),
        )  # fmt: skip

    def _for_prompts(self, chosen: AnyDeployment) -> tuple[AnyDeployment, float | None]:
        """Choose how prompts are read, as far as there is time. Returns it, and the seconds of a prompt's token."""
        seconds = None
        for part, knob, values in self.space.prompts:
            ways = {str(n): chosen.model_copy(update={knob: n}) for n in values}
            times = self._compare(part, ways, base=chosen, rounds=7, prompts=True)
            if times:
                best = min(ways, key=lambda name: times[name].ratio)
                if times[best].ratio > _WORTH:
                    best = BASE
                chosen, seconds = ways.get(best, chosen), times[best].seconds
        return chosen, seconds

    def _nothing(self) -> str:
        """Say why there is nothing to choose from."""
        errors = [trial.user_attrs["error"] for trial in self.tried().values() if "error" in trial.user_attrs]
        if errors or not self._left(self.space.every()):
            return "; ".join(["no deployment could be measured", *errors[:1]])
        return (
            f"no deployment that loses at most {MOST_LOSS:.1%} was measured within the budget of"
            f" {self.costs.seconds:g} s; a run with a larger one goes on from here"
        )

    def _expected(self, part: Part) -> float:
        """Return the seconds that a part and those after it are expected to take."""
        return sum(map(self.costs.of_part, self.parts[self.parts.index(part) :]))

    def _compare(
        self, part: Part, others: dict[str, AnyDeployment], *, base: AnyDeployment, **options: Any
    ) -> dict[str, Measured]:
        """Time deployments; nothing if that, and the parts after it, are not expected to end in time.

        A default's trial, which writes files, too, tells how long files take that are not written yet.
        """
        missing = {each.group for each in (base, *others.values()) if not self.stored.has(each)}
        if self.costs.left() < self._expected(part) + len(missing) * self.costs.of_trial(True):
            return {}
        self.on_progress(self.progress(part.doing))
        if options.get("compiled"):
            self.stored.write_model()
        self.process.deadline = self.costs.end
        try:
            return self.ask(others, base=base, seconds=self.costs.timing(part.seconds), **options).times
        except OutOfTimeError:
            return {}

    def ask(self, others: dict[str, AnyDeployment], *, base: AnyDeployment, **options: Any) -> Answer:
        """Measure in a process of its own. Raises FailedError if it fails or takes too long."""
        try:
            for deployment in (base, *others.values()):
                self.stored.write(deployment)
        except (ValueError, RuntimeError) as error:
            raise FailedError("not_written", str(error)) from None
        request = Request(config=self.stored.config, folder=self.stored.folder, base=base, others=others, **options)
        limit = min(LONGEST_LIMIT, max(60.0, self.costs.seconds))
        found: Answer = self.process.call("run", limit, "run", request)
        self.costs.opening = max(self.costs.opening, found.opening or 0.0)
        return found

    def tried(self) -> dict[AnyDeployment, Any]:
        """Return the trials that were measured or failed, by deployment."""
        return {self._deployment(trial): trial for trial in self._ended()}

    def _ended(self) -> list[Any]:
        return [t for t in self.study.get_trials(deepcopy=False) if {"point", "error"} & t.user_attrs.keys()]

    def _deployment(self, trial: Any) -> AnyDeployment:
        from optuna.trial import FixedTrial

        return self.space.suggest(FixedTrial(trial.params))

    def tried_points(self) -> list[Point]:
        """Return what was measured."""
        texts = [trial.user_attrs.get("point") for trial in self.tried().values()]
        return [Point.model_validate_json(text) for text in texts if text]

    def losses(self) -> dict[str, float]:
        """Return the loss of each group whose default was measured."""
        return {point.deployment.group: point.loss for point in self.tried_points()}

    def _best(self) -> float:
        return min((point.seconds for point in self.tried_points() if point.loss <= MOST_LOSS), default=inf)

    def progress(self, doing: str) -> Progress:
        """Return the progress."""
        trials = self.tried().values()
        failures = sum("error" in trial.user_attrs for trial in trials)
        best = self._best()
        return Progress(doing, len(trials), None if best == inf else best, failures, max(0.0, self.costs.left()))
