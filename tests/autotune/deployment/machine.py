"""A machine on which deployments take known times, on a clock of its own."""

from __future__ import annotations

from autotune.deployment.trial import BASE, COMPILED, Answer, Measured, Request
from autotune.study.worker import OutOfTimeError
from schedules.deployment import AnyDeployment, OnnxDeployment

LOSSES = {"float32": 0.0, "bfloat16": 0.001, "int8": 0.004, "int4": 0.05}


def seconds(deployment: AnyDeployment) -> float:
    """Return the seconds of a token where int4 is fastest, int8 next, and two rows are best; and in ONNX Runtime
    kernels, and threads that sleep."""
    speed = {"float32": 8.0, "bfloat16": 4.0, "int8": 2.0, "int4": 1.0}[deployment.precision]
    if isinstance(deployment, OnnxDeployment):
        slower = 1 + (not deployment.kernels) + 0.1 * deployment.spinning + 0.1 / deployment.prompt_threads
        return 1e-6 * speed * slower / deployment.threads
    prompts = (1 + 1 / deployment.tokens) * (1 + 8 / deployment.block)
    return 1e-6 * speed * (1 + abs(deployment.rows - 2)) / deployment.threads * prompts


def answer(request: Request) -> Answer:
    base = seconds(request.base)
    times = {name: seconds(each) for name, each in {BASE: request.base, **request.others}.items()}
    if request.compiled:
        times[COMPILED] = 20e-6
    bits = (2 + 2 * LOSSES[request.base.precision], 2.0) if request.judge else None
    measured = {name: Measured(seconds=x, ratio=x / base, spread=0.0) for name, x in times.items()}
    return Answer(times=measured, bits=bits)


OPENING, WRITING = 4.0, 3.0  # seconds of building a library, and of writing weights


class Machine:
    """A process that answers requests by a function, which tests may replace, at the cost of time on a clock."""

    answer = staticmethod(answer)
    clock, cut = 0.0, 0

    def __init__(self, makes: object) -> None:
        self.deadline: float | None = None
        self.built: set[AnyDeployment] = set()

    def call(self, method: str, limit: float, phase: str, request: Request) -> Answer:
        found = Machine.answer(request)
        libraries = {request.base, *request.others.values()}
        took = OPENING * len(libraries - self.built) + request.seconds
        self.built |= libraries
        if self.deadline is not None and Machine.clock + took > self.deadline:
            Machine.clock = self.deadline
            Machine.cut += 1
            raise OutOfTimeError(method)
        Machine.clock += took
        return found.model_copy(update={"opening": OPENING})

    def kill(self) -> None:
        pass
