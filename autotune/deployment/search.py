"""An Optuna search with two goals: the time of a token, and how well the model still predicts."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from autotune.deployment.trial import BASE, COMPILED, TEXT, Answer, Request
from autotune.study.journal import open_journal
from export.c.build import write_weights
from export.c.session import WEIGHTS
from export.description import sha256
from export.quality import HeldOut
from lowering.aot import build, weights
from lowering.aot.function import FORMATS
from lowering.targets import cpu_name
from ramnet import RamNetForCausalLM
from schedules.deployment import Deployment, DeploymentRecord, Point, digest, front

# The constraint: the chosen deployment predicts at most this much worse than float32, relative to its bits a token.
MOST_LOSS = 0.005
ROWS, LANES, TOKENS, SPINS = (1, 2, 4, 8), (16, 32, 64), (2, 4, 8), (0, 2000, 20000, 200000)
FINALISTS = 3
_PATIENCE = 5


@dataclass(frozen=True)
class Progress:
    """The progress of a search; ``gain`` is over the default in float32."""

    doing: str
    trials: int
    gain: float
    failures: int
    seconds_left: float


class Search:
    """A search for one model on this CPU.

    Args:
        model: the model, whose weights are written to ``folder`` in each precision while the search runs.
        text: held-out text that judges the precisions; None for the float32 model's own predictions.
        journal: the file of all trials, which a later run resumes.
    """

    def __init__(
        self, model: RamNetForCausalLM, text: HeldOut | None, folder: Path, journal: Path, *, threads: int, seed: int,
        limit: float, on_progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.config, self.folder, self.threads, self.seed, self.limit = model.config, folder, threads, seed, limit
        self.on_progress = on_progress
        self.precisions = [x for x in FORMATS if _refusal(model, x) is None]
        self.sizes: dict[str, int] = {}
        for precision in self.precisions:
            (folder / precision).mkdir()
            stored = write_weights(model, precision, folder / precision)
            self.sizes[precision] = weights.bytes_of_token(stored)
        self.judged_by = "its own predictions in float32" if text is None else f"text {text.source}"
        if text is not None:
            np.savez(folder / TEXT, ids=text.ids, labels=text.labels)
        self.fingerprint = hashlib.sha256("\n".join(build.sources()).encode()).hexdigest()[:12]
        known = sha256(folder / "float32" / WEIGHTS)[:16]
        judged = "" if text is None else hashlib.sha256(text.ids.tobytes()).hexdigest()[:8]
        name = f"deployment {digest(self.config)} {known} {judged} | {cpu_name()} | {threads} | {self.fingerprint}"
        self.study = optuna.create_study(
            storage=open_journal(journal), study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
        for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process was killed
        self.losses = {point.deployment.precision: point.loss for point in self.tried_points()}

    def defaults(self) -> dict[str, Deployment]:
        """Return the default of each precision."""
        spins = build.LOOPS.spins
        return {
            p: Deployment(precision=p, threads=self.threads, spins=spins, **FORMATS[p].default._asdict())
            for p in self.precisions
        }

    def every(self) -> list[Deployment]:
        """Return all deployments of the space."""
        found = dict.fromkeys(self.defaults().values())
        sizes = product(self.precisions, ROWS, LANES, range(1, self.threads + 1), SPINS)
        for precision, rows, lanes, threads, spins in sizes:
            tokens, own = FORMATS[precision].default.tokens, FORMATS[precision].default.lanes
            # Integers have as many lanes as the processor's instruction; one thread does not wait for others.
            point = Deployment(
                precision=precision, rows=rows, lanes=own if precision in weights.SCALED else lanes, tokens=tokens,
                threads=threads, spins=build.LOOPS.spins if threads == 1 else spins,
            )  # fmt: skip
            found[point] = None
        return list(found)

    def run(self, end: float) -> None:
        """Try deployments until the time ``end`` by perf_counter, the default of each precision first."""
        import optuna

        tried = self.tried()
        for default in self.defaults().values():
            if default not in tried:
                self.study.enqueue_trial(default.model_dump())
        every, longest = self.every(), 0.0
        while perf_counter() + longest < end and len(tried) < len(every):
            begin = perf_counter()
            trial, deployment = self._next(every, tried)
            self.on_progress(self.progress(str(deployment), end))
            try:
                point, gain = self._measure(deployment, end)
            except TrialError as error:
                if perf_counter() < end:  # else it says nothing about the deployment
                    trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                trial.set_user_attr("point", point.model_dump_json())
                trial.set_user_attr("gain", gain)
                self.study.tell(trial, [point.seconds, point.loss])
            tried = self.tried()
            longest = max(longest, perf_counter() - begin)

    def _next(self, every: list[Deployment], tried: dict[Deployment, Any]) -> tuple[Any, Deployment]:
        """Return a trial of an untried deployment; suggestions that were tried before are not kept."""
        import optuna

        for _ in range(_PATIENCE):
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = optuna.samplers.TPESampler(seed=(self.seed * 100_003 + number) % 2**32)
            trial = self.study.ask()
            found = self._suggest(trial)
            if found not in tried and found in every:
                return trial, found
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        left = [each for each in every if each not in tried]
        drawn = random.Random(self.seed + len(tried)).choice(left)
        self.study.enqueue_trial(drawn.model_dump())
        trial = self.study.ask()
        return trial, self._suggest(trial)

    def _suggest(self, trial: Any) -> Deployment:
        precision = trial.suggest_categorical("precision", self.precisions)
        default = FORMATS[precision].default
        knobs = {
            "rows": trial.suggest_categorical("rows", ROWS),
            "lanes": trial.suggest_categorical("lanes", LANES),
            "threads": trial.suggest_int("threads", 1, self.threads),
            "spins": trial.suggest_categorical("spins", SPINS),
        }
        if precision in weights.SCALED:
            knobs["lanes"] = default.lanes
        if knobs["threads"] == 1:
            knobs["spins"] = build.LOOPS.spins
        return Deployment(precision=precision, tokens=default.tokens, **knobs)

    def _measure(self, deployment: Deployment, end: float) -> tuple[Point, float]:
        """Measure a deployment beside the default in float32, and its precision's loss if it is not known."""
        precision = deployment.precision
        judge = None if precision in self.losses else precision
        answer = self.ask({"it": deployment}, rounds=9, seconds=2.0, judge=judge, limit=end - perf_counter())
        if answer.bits is not None:
            self.losses[precision] = answer.bits[0] / answer.bits[1] - 1
        time = answer.times["it"]
        point = Point(
            deployment=deployment, seconds=time.seconds, loss=self.losses[precision], size=self.sizes[precision]
        )
        return point, 1 / time.ratio

    def finish(self) -> DeploymentRecord:
        """Measure the best again, beside ``lowering.compile``, choose among them, and tune prompts of the chosen one.

        Raises RuntimeError if no deployment could be measured.
        """
        points = list(self.tried_points())
        allowed = sorted((p for p in points if p.loss <= MOST_LOSS), key=lambda p: p.seconds)[:FINALISTS]
        if not allowed:
            raise RuntimeError("no deployment could be measured; give the search more time")
        self.on_progress(self.progress("measuring the best again", perf_counter()))
        finalists = {str(i): point.deployment for i, point in enumerate(allowed)}
        answer = self.ask(finalists, rounds=25, seconds=12.0, compiled=True)
        best = min(finalists, key=lambda name: answer.times[name].ratio)
        chosen = self._for_prompts(finalists[best])
        against = self.ask({}, rounds=25, seconds=12.0, compiled=True, base=chosen)
        compiled = against.times[COMPILED]
        point = allowed[int(best)].model_copy(update={"deployment": chosen, "seconds": against.times[BASE].seconds})
        return DeploymentRecord(
            model=digest(self.config), device=cpu_name(), chosen=point, gain=compiled.ratio,
            gain_spread=compiled.spread, judged_by=self.judged_by, most_loss=MOST_LOSS, front=front([*points, point]),
            trials=len(points), fingerprint=self.fingerprint, date=datetime.now(UTC).date().isoformat(),
        )  # fmt: skip

    def _for_prompts(self, chosen: Deployment) -> Deployment:
        """Choose how many tokens of a prompt share a loop."""
        ways = {str(n): chosen.model_copy(update={"tokens": n}) for n in TOKENS}
        answer = self.ask(ways, rounds=7, seconds=6.0, prompts=True)
        return ways[min(ways, key=lambda name: answer.times[name].ratio)]

    def ask(
        self, others: dict[str, Deployment], *, base: Deployment | None = None, limit: float | None = None,
        **options: Any,
    ) -> Answer:  # fmt: skip
        """Measure in a process of its own. Raises TrialError if it fails or takes too long."""
        request = Request(
            config=self.config, folder=self.folder, base=base or self.defaults()["float32"], others=others, **options
        )
        return _in_a_process(request, self.limit if limit is None else min(limit, self.limit))

    def tried(self) -> dict[Deployment, Any]:
        """Return the trials that were measured or failed, by deployment."""
        from optuna.trial import FixedTrial

        ended = (t for t in self.study.get_trials(deepcopy=False) if {"point", "error"} & t.user_attrs.keys())
        return {self._suggest(FixedTrial(trial.params)): trial for trial in ended}

    def tried_points(self) -> list[Point]:
        """Return what was measured."""
        texts = [trial.user_attrs.get("point") for trial in self.tried().values()]
        return [Point.model_validate_json(text) for text in texts if text]

    def progress(self, doing: str, end: float) -> Progress:
        """Return the progress."""
        trials = self.tried().values()
        gains = [float(trial.user_attrs["gain"]) for trial in trials if "gain" in trial.user_attrs]
        failures = len(trials) - len(gains)
        return Progress(doing, len(trials), max(gains, default=1.0), failures, max(0.0, end - perf_counter()))


class TrialError(RuntimeError):
    """A deployment could not be built, is wrong, or took too long."""


def _in_a_process(request: Request, limit: float) -> Answer:
    with tempfile.TemporaryDirectory(prefix="ramnet-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(request.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "autotune.deployment.trial", str(path)]
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        ) as process:
            try:
                out, errors = process.communicate(timeout=max(limit, 1.0))
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise TrialError(f"it took more than {limit:.0f} s") from None
                raise
    if process.returncode:
        lines = errors.strip().splitlines() or [f"it ended with status {process.returncode}"]
        raise TrialError(lines[-1])
    return Answer.model_validate_json(out.splitlines()[-1])


def _refusal(model: RamNetForCausalLM, precision: str) -> str | None:
    try:
        weights.check(model.config, precision)
    except ValueError as error:
        return str(error)
    return None
