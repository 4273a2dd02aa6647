"""A process that builds, checks and times kernels for the tuner, and that can be killed when one of them hangs."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

from autotune.measure.timing import Timing
from schedules.base import Schedule
from schedules.workload import Workload

if TYPE_CHECKING:
    from autotune.model.prediction import Prediction

# Imports of torch and tvm, and the reference's answer, on a slow and busy machine.
START_SECONDS = 180.0
# A week; the system waits no longer than 2^31 ms at a time.
LONGEST_LIMIT = 604800.0


class FailedError(RuntimeError):
    """A candidate came to nothing: ``status`` says how in one word, the text why."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


def cpu_runner() -> Any:
    """What a worker does for a CPU."""
    from autotune.measure.cpu_runner import CpuRunner

    return CpuRunner()


class OutOfTimeError(FailedError):
    """The time of the whole run was over in the middle of something, which says nothing of the candidate."""

    def __init__(self, doing: str) -> None:
        super().__init__("out_of_time", f"there was no more time for it in {doing}")


class Worker:
    """The tuner's side of the process, which is started when it is needed and replaced when it was killed.

    Args:
        threads: of the kernels.
        build_limit, run_limit: seconds that a candidate may take to build; and to be checked, or timed beyond the
            seconds that timing was granted.
        makes: gives what does the work, in the process. Both sides import it, so it must be a module's function.

    Raises:
        ValueError: for a limit that is not above 0, or longer than a week.
    """

    def __init__(
        self, threads: int, build_limit: float = 60.0, run_limit: float = 30.0, makes: Callable[[], Any] = cpu_runner
    ) -> None:
        for name, limit in (("build_limit", build_limit), ("run_limit", run_limit)):
            if not 0 < limit <= LONGEST_LIMIT:
                raise ValueError(f"{name} is {limit}; it must be above 0 and at most {LONGEST_LIMIT:g} seconds")
        self.threads, self.build_limit, self.run_limit = threads, build_limit, run_limit
        self.makes = makes
        self.deadline: float | None = None  # by perf_counter: what takes longer is killed, with OutOfTimeError
        self.process: Any = None
        self.workload: tuple[Workload, str] | None = None
        self.log: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def open(self, workload: Workload, target: str) -> None:
        """What follows is about ``workload``. FailedError where not even its inputs can be made."""
        self.workload = workload, target
        if self.process is None:
            self._start()
        else:
            self._call("open", START_SECONDS, "start", workload, target, self.threads)

    def try_out(self, schedule: Schedule) -> None:
        """Build and check. FailedError: build_error, build_timeout, wrong_result, run_error, run_timeout or crash."""
        self._call("build", self.build_limit, "build", schedule)
        self._call("check", self.run_limit, "run", schedule)

    def measure(
        self, candidates: Mapping[str, Schedule | None], rounds: int, seconds: float
    ) -> dict[str, Timing]:  # fmt: skip
        """Time in turn; None is the reference. FailedError: run_error, run_timeout or crash."""
        for schedule in candidates.values():
            if schedule is not None:  # a fresh process has built nothing yet
                self._call("build", self.build_limit, "build", schedule)
        timings: dict[str, Timing] = self._call(
            "measure", self.run_limit + seconds, "run", dict(candidates), rounds, seconds
        )
        return timings

    def predict(self, schedule: Schedule) -> Prediction:
        """Compile for the target, of which nothing runs. FailedError: compile_error, compile_timeout, crash, or why
        the binary is not fit for the target."""
        found: Prediction = self._call("predict", self.build_limit, "compile", schedule)
        return found

    def kill(self) -> None:
        """End the process, whatever it does, and the compilers that it started."""
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

    def _start(self) -> None:
        assert self.workload is not None
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
        self._call("open", START_SECONDS, "start", *self.workload, self.threads)

    def _call(self, method: str, limit: float, phase: str, *arguments: Any) -> Any:
        if self.process is None:
            self._start()
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
        except BaseException:  # Ctrl-C: the answer may still come, and would be taken for the next one's
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


def _serve(connection: Connection, makes: Callable[[], Any], log: Connection) -> None:
    """The worker's process: does what it is told until its parent ends."""
    _die_with_parent()
    os.environ.pop("TRITON_INTERPRET", None)  # here kernels are compiled
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
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
    """The error's type and text; of a compiler's long one, which quotes the program, the head and the end."""
    text = " ".join(re.sub(r"\^{2,}", " ", f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 600 else f"{text[:250]} … {text[-350:]}"


def _die_with_parent() -> None:
    """End when the parent does, also by kill -9 and in the middle of a kernel."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
