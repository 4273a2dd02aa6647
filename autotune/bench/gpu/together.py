"""Runs commands side by side within a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter, sleep

# Seconds between two looks at the commands.
INTERVAL = 0.2


def together(
    commands: Mapping[str, Sequence[str]], seconds: float, folder: Path, *, groups: bool = False,
    stops: Callable[[], bool] = lambda: False,
) -> dict[str, int | None]:  # fmt: skip
    """Run ``commands`` side by side and return their exit statuses by name; None for those that took too long.

    The output of each is in ``folder``, in NAME.out and NAME.err. Whatever ends this function ends the commands.

    Args:
        groups: start each command in a process group of its own, and end the whole group: what a command leaves behind
            would disturb the next.
        stops: called a few times per second; the commands are ended if it returns True.
    """
    end = perf_counter() + seconds
    running: dict[str, subprocess.Popen[bytes]] = {}
    ended: dict[str, int | None] = {}
    with ExitStack() as stack:
        try:
            for name, command in commands.items():
                out, err = (stack.enter_context((folder / f"{name}.{kind}").open("wb")) for kind in ("out", "err"))
                running[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0 if groups else None
                )
            while len(ended) < len(running) and perf_counter() < end and not stops():
                sleep(INTERVAL)
                ended |= {name: status for name, each in running.items() if (status := each.poll()) is not None}
        finally:
            for each in running.values():
                _end(each, groups)
    return {name: ended.get(name) for name in commands}


def _end(process: subprocess.Popen[bytes], group: bool) -> None:
    if group:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
