"""Compiling flash-linear-attention's kernels beforehand: ``python -m autotune.bench.gpu.warm SHARE OF``.

In its first call, the library compiles about 270 schedules of chunk_gla one after another, which takes minutes. Here,
parallel processes compile a share each into Triton's cache.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from autotune.bench.gpu.run import GpuRun
from autotune.bench.gpu.together import together
from autotune.bench.run import Table

PROCESSES = 12
# The share of the part's time. If the part were killed at its end, these processes would disturb the next part.
SHARE = 0.8


def peers(run: GpuRun) -> list[Table]:
    """Fill the cache if the library is installed. Nothing is measured, so there is no table."""
    if importlib.util.find_spec("fla") is None:
        return []
    run.on_step("compiling flash-linear-attention's kernels")
    command = [sys.executable, "-m", "autotune.bench.gpu.warm"]
    commands = {str(i): [*command, str(i), str(PROCESSES)] for i in range(PROCESSES)}
    with tempfile.TemporaryDirectory() as folder:
        ended = together(commands, SHARE * run.seconds, Path(folder))
    late = sum(status is None for status in ended.values())
    failed = sum(status not in (None, 0) for status in ended.values())
    for count, how in ((late, "did not end in time"), (failed, "failed")):
        if count:
            run.notice(f"{count} of {PROCESSES} processes that compile flash-linear-attention's kernels {how}")
    return []


def take_share(share: int, of: int) -> None:
    """Restrict autotuned kernels that are created from now on to every ``of``-th schedule, starting with ``share``."""
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
