"""Compiling flash-linear-attention's kernels beforehand: ``python -m autotune.bench.gpu.warm SHARE OF``.

The library tries some 270 schedules of chunk_gla at its first call and compiles them one after another, for minutes.
Processes side by side, each with its share of them, leave the binaries in Triton's cache.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from time import perf_counter
from typing import Any

from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import Table

PROCESSES = 12
# Of the part's time. Who is killed at its end leaves these processes behind, beside whatever is measured next.
SHARE = 0.8


def peers(run: GpuRun) -> list[Table]:
    """Fill the cache; nothing is measured, so there is no table. Without the library there is nothing to do."""
    if importlib.util.find_spec("fla") is None:
        return []
    run.on_step("compiling flash-linear-attention's kernels")
    command = [sys.executable, "-m", "autotune.bench.gpu.warm"]
    sides = [
        subprocess.Popen([*command, str(i), str(PROCESSES)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(PROCESSES)
    ]
    end = perf_counter() + SHARE * run.seconds
    try:
        failed = sum(side.wait(timeout=max(end - perf_counter(), 0)) != 0 for side in sides)
    except subprocess.TimeoutExpired:
        failed = sum(side.poll() != 0 for side in sides)
    finally:
        for side in sides:
            side.kill()
    if failed:
        run.notice(f"{failed} of {PROCESSES} processes that compile flash-linear-attention's kernels failed")
    return []


def take_share(share: int, of: int) -> None:
    """From here on, autotuned kernels are made with every ``of``-th of their schedules only, ``share`` the first."""
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.__init__

    def some(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **named: Any) -> None:
        whole(self, fn, arg_names, configs[share::of] or configs[:1], *rest, **named)

    Autotuner.__init__ = some


def _main(share: str, of: str) -> None:
    take_share(int(share), int(of))
    from autotune.bench.gpu import others

    # What is compiled does not depend on how many sequences there are, nor on how long they are.
    others.chunk_gla(GpuRun(), others.Sizes(batch=2, tokens=512))


if __name__ == "__main__":
    _main(*sys.argv[1:])
