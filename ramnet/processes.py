"""Child processes that end when their parent does, or is interrupted."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait


def usable_cores() -> int:
    """Return how many cores this process may run on, which taskset, containers and schedulers restrict."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent() -> None:
    """Make the system kill this process when the parent ends, even by kill -9 and during a kernel."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def process_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes, which end at once if the block ends with an exception, such as Ctrl-C.

    They also end when this process does, even by kill -9. A plain pool would first finish what it does.
    """
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=die_with_parent)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()).difference(others):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
