"""Measures decoding in a separate process, which is
``python -m autotune.bench.cpu.decode_process TARGET PRESET THREADS QUICK``.

In training and prefill, idle kernel threads should sleep at once, since torch's threads run between kernels. In
decoding, they should spin until the next of a token's 109 matrix products. The spin count is fixed when TVM's runtime
is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from autotune.bench.cpu import language_model
from autotune.bench.cpu.apart import output_of
from autotune.bench.run import Run, Table
from ramnet.allocator import keep_freed_memory

# "340m" on two cores takes 1.16 to 1.18 times its bandwidth bound with this, 1.30 with 1000 spins, and 1.24 to 1.31
# with none, timed by single tokens. The value was chosen after these measurements.
DECODING = {"TVM_THREAD_POOL_SPIN_COUNT": "20000"}


def decode(run: Run, preset: str, threads: int, timeout: float = 600) -> Table:
    """Run ``language_model.decode`` in a process with ``DECODING``. Raises what ``output_of`` does."""
    run.on_step(f"decode {preset}")
    arguments = (run.target, preset, str(threads), str(int(run.quick)))
    # This process, too, has set a spin count, for training and prefill.
    said = output_of(__name__, *arguments, timeout=timeout, environment={**os.environ, **DECODING})
    found = json.loads(said.splitlines()[-1])
    run.facts |= found["facts"]
    for text in found["notices"]:
        run.notice(text)
    run.notice(f"decode {preset} ran in a process with {' '.join(f'{k}={v}' for k, v in DECODING.items())}")
    return Table.from_json(found["table"])


def _main(target: str, preset: str, threads: str, quick: str) -> None:
    run = Run(target, quick == "1")
    keep_freed_memory()
    table = language_model.decode(run, preset, int(threads))
    sys.stdout.write(json.dumps({"table": asdict(table), "facts": run.facts, "notices": run.notices}) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
