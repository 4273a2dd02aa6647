"""A worker's predictor for a GPU that this machine need not have: compiles kernels and models their time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autotune.model import gpu as time_model
from lowering.gpu.offline import compile_for
from lowering.gpu.resources import Compiled
from lowering.targets import gpu_of
from schedules.base import Schedule
from schedules.records import Launch
from schedules.workload import Workload

Compile = Callable[[Workload, str, Schedule], list[Compiled]]


@dataclass(frozen=True)
class Prediction:
    """The result for a schedule that was compiled, not run.

    Attributes:
        seconds: the time modelled by ``autotune.model.gpu``.
        launches: the resources of the binaries.
        binds: for each launch, the longest term of the model and its total seconds.
        status, reason: "ok", or one word and one sentence on why the binaries cannot be used on the target.
    """

    seconds: float
    launches: tuple[Launch, ...]
    binds: tuple[tuple[str, float], ...]
    status: str = "ok"
    reason: str = ""


class Predictor:
    """Runs in the worker's process. ``compile_launches`` compiles a schedule's launches."""

    def __init__(self, compile_launches: Compile = compile_for) -> None:
        self.compile_launches = compile_launches

    def open(self, workload: Workload, target: str, threads: int) -> None:
        """Set the workload; ``threads`` is not used, as nothing runs."""
        self.workload, self.target, self.gpu = workload, target, gpu_of(target)

    def predict(self, schedule: Schedule) -> Prediction:
        """Compile and model a schedule. Raises RejectedError if no program fits on the target; compilers' errors are
        not caught."""
        compiled = self.compile_launches(self.workload, self.target, schedule)
        terms = time_model.explain(compiled, self.gpu)
        launches = tuple(
            Launch(name=x.name, registers=x.resources.registers, spilled=x.resources.spilled, local=x.resources.local,
                   shared=x.resources.shared)
            for x in compiled
        )  # fmt: skip
        status, reason = "ok", ""
        for launch in compiled:
            try:
                time_model.check(launch, self.gpu)
            except time_model.RejectedError as rejected:
                status, reason = rejected.status, str(rejected)
                break
        seconds = sum(term.seconds for term in terms)
        return Prediction(seconds, launches, tuple((term.binds, term.seconds) for term in terms), status, reason)
