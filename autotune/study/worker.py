"""A process that builds, checks and times candidates for the tuner, and that can be killed if one hangs."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

from autotune.measure.timing import Timing
from ramnet.processes import die_with_parent
from schedules.base import Schedule
from schedules.workload import Workload

if TYPE_CHECKING:
    from autotune.model.prediction import Prediction

# Time for imports of torch and tvm, and the reference's results, on a slow and busy machine.
START_SECONDS = 180.0
# A week; the system waits no longer than 2^31 ms at a time.
LONGEST_LIMIT = 604800.0


class FailedError(RuntimeError):
    """A candidate failed: ``status`` is the kind of failure in one word, the message the reason."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


def cpu_runner() -> Any:
    """Create a worker's runner for a CPU."""
    from autotune.measure.cpu_runner import CpuRunner

    return CpuRunner()


class OutOfTimeError(FailedError):
    """The run's time was over during an operation, which says nothing about the candidate."""

    def __init__(self, doing: str) -> None:
        super().__init__("out_of_time", f"there was no more time for it in {doing}")


class Process:
    """The tuner's side of a process that serves calls. It is started on demand and replaced after it was killed.

    Args:
        makes: creates the object whose methods are called in the process. It must be a module's function or class,
            which both sides import.
    """

    def __init__(self, makes: Callable[[], Any]) -> None:
        self.makes = makes
        self.deadline: float | None = None  # by perf_counter; operations beyond it are killed and raise OutOfTimeError
        self.process: Any = None
        self.log: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill the process and the compilers that it started."""
        if self.process is not None:
            import psutil

            with suppress(psutil.Error):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    with suppress(psutil.Error):
                        child.kill()
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None
            self.log.close()

    def start(self) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        # What a crash leaves to say. It has no name, so that nothing stays behind, however either process ends; a
        # connection is what carries its descriptor across.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        log = Connection(os.dup(self.log.fileno()))
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.makes, log), daemon=True)
        process.start()
        self.process = process
        log.close()
        theirs.close()

    def call(self, method: str, limit: float, phase: str, *arguments: Any) -> Any:
        """Call a method. Raises FailedError if it raises, takes more than ``limit`` seconds or crashes, and
        OutOfTimeError at ``deadline``."""
        if self.process is None:
            self.start()
        left = limit if self.deadline is None else self.deadline - perf_counter()
        try:
            self.connection.send((method, arguments))
            if not self.connection.poll(max(0.0, min(limit, left))):
                self.kill()
                if left < limit:
                    raise OutOfTimeError(method)
                raise FailedError(f"{phase}_timeout", f"{method} took longer than {limit:g} s")
            status, result = self.connection.recv()
        except (EOFError, OSError):
            raise FailedError("crash", self._last_words(method)) from None
        except BaseException:  # Ctrl-C: a late answer would be taken for that of the next request
            self.kill()
            raise
        if status == "ok":
            return result
        raise FailedError(f"{phase}_error" if status == "error" else status, result)

    def _last_words(self, method: str) -> str:
        self.process.join(5)
        code = self.process.exitcode
        how = f"exit status {code}"
        if code is not None and code < 0:
            how = f"signal {-code} ({signal.strsignal(-code)})"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        self.kill()
        return f"the process ended in {method} with {how}" + "".join(f"; {line}" for line in lines[:1])


class Worker(Process):
    """A process that runs kernels of a workload.

    Args:
        threads: of the kernels.
        build_limit: the most seconds for building a candidate.
        run_limit: the most seconds for checking a candidate, and for timing in excess of the requested seconds.
        makes: creates the runner or predictor in the process.

    Raises:
        ValueError: if a limit is not above 0, or longer than a week.
    """

    def __init__(
        self, threads: int, build_limit: float = 60.0, run_limit: float = 30.0, makes: Callable[[], Any] = cpu_runner
    ) -> None:
        super().__init__(makes)
        for name, limit in (("build_limit", build_limit), ("run_limit", run_limit)):
            if not 0 < limit <= LONGEST_LIMIT:
                raise ValueError(f"{name} is {limit}; it must be above 0 and at most {LONGEST_LIMIT:g} seconds")
        self.threads, self.build_limit, self.run_limit = threads, build_limit, run_limit
        self.workload: tuple[Workload, str] | None = None

    @property
    def longest_trial(self) -> float:
        """The seconds after which a trial has ended, whatever becomes of it: starting, building, checking, timing."""
        return 60.0 + START_SECONDS + 2 * (self.build_limit + self.run_limit)

    def start(self) -> None:
        assert self.workload is not None
        super().start()
        self.call("open", START_SECONDS, "start", *self.workload, self.threads)

    def open(self, workload: Workload, target: str) -> None:
        """Set the workload. Raises FailedError if its inputs cannot be created."""
        self.workload = workload, target
        if self.process is None:
            self.start()
        else:
            self.call("open", START_SECONDS, "start", workload, target, self.threads)

    def try_out(self, schedule: Schedule) -> None:
        """Build and check a schedule. Raises FailedError: build_error, build_timeout, wrong_result, run_error,
        run_timeout or crash."""
        self.call("build", self.build_limit, "build", schedule)
        self.call("check", self.run_limit, "run", schedule)

    def measure(
        self, candidates: Mapping[str, Schedule | None], rounds: int, seconds: float
    ) -> dict[str, Timing]:  # fmt: skip
        """Time candidates in turn; None is the reference. Raises FailedError: run_error, run_timeout or crash."""
        for schedule in candidates.values():
            if schedule is not None:  # a new process has built nothing yet
                self.call("build", self.build_limit, "build", schedule)
        timings: dict[str, Timing] = self.call(
            "measure", self.run_limit + seconds, "run", dict(candidates), rounds, seconds
        )
        return timings

    def predict(self, schedule: Schedule) -> Prediction:
        """Compile for the target and model the time. Raises FailedError: compile_error, compile_timeout, crash, or why
        the binary cannot be used on the target."""
        found: Prediction = self.call("predict", self.build_limit, "compile", schedule)
        return found


def _serve(connection: Connection, makes: Callable[[], Any], log: Connection) -> None:
    """The worker's process: serves requests until its parent ends."""
    die_with_parent()
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled, not interpreted
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    for output in (1, 2):
        os.dup2(log.fileno(), output)
    faulthandler.enable(2)
    does = makes()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("ok", getattr(does, method)(*arguments))
        except Exception as error:  # noqa: BLE001 whatever a candidate raises is its result
            status = getattr(error, "status", "")
            answer = (status, str(error)) if status else ("error", _one_line(error))
        connection.send(answer)


def _one_line(error: Exception) -> str:
    """Return the error's type and message; of a compiler's long message, only the beginning and the end."""
    text = " ".join(re.sub(r"\^{2,}", " ", f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 600 else f"{text[:250]} … {text[-350:]}"
