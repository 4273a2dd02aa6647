"""Decoding in a process of its own, as a server would.

``python -m autotune.bench.cpu.decode_process TARGET PRESET THREADS QUICK`` is that process.

Training and prefill want the kernels' threads to sleep at once, since torch's own take over between kernels; decoding
wants them awake for the next of its 109 products a token. How long they spin is fixed when TVM's runtime loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

from autotune.bench.cpu import language_model
from autotune.bench.run import Row, Run, Table
from autotune.measure.freed_memory import keep_freed_memory

# "340m" on two cores takes 1.16 to 1.18 times its floor so, and 1.30 with 1000
# spins; with none 1.24 to 1.31, timed by single tokens. Chosen after these were seen.
DECODING = {"TVM_THREAD_POOL_SPIN_COUNT": "20000"}


def decode(run: Run, preset: str, threads: int, timeout: float = 600) -> Table:
    """``model.decode`` in a process with ``DECODING``; RuntimeError, with the last line it said, where that fails."""
    run.on_step(f"decode {preset}")
    arguments = (run.target, preset, str(threads), str(int(run.quick)))
    command = [sys.executable, "-m", "autotune.bench.cpu.decode_process", *arguments]
    environment = {**DECODING, **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no word"]
        raise RuntimeError(f"measuring decode {preset} failed: {said[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    run.facts |= found["facts"]
    for text in found["notices"]:
        run.notice(text)
    run.notice(f"decode {preset} ran in a process with {' '.join(f'{k}={v}' for k, v in DECODING.items())}")
    table = found["table"]
    return Table(**{**table, "rows": [Row(**row) for row in table["rows"]]})


def _main(target: str, preset: str, threads: str, quick: str) -> None:
    run = Run(target, quick == "1")
    keep_freed_memory()
    table = language_model.decode(run, preset, int(threads))
    sys.stdout.write(json.dumps({"table": asdict(table), "facts": run.facts, "notices": run.notices}) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
