"""Measures the peak memory of the scan's forward and backward in a separate process, which is
``python -m autotune.bench.cpu.peak_memory TARGET``.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import NamedTuple

from autotune.bench.cpu.apart import output_of


class Peak(NamedTuple):
    """The peak of bytes that the forward and backward held, including inputs, and the most that they may hold."""

    measured: int
    budget: int


def measure_in_process(target: str, timeout: float = 120) -> Peak:
    """Run this file in a process. Raises what ``output_of`` does."""
    measured, budget = map(int, output_of(__name__, target, timeout=timeout).split()[-2:])
    return Peak(measured, budget)


def measure(target: str) -> Peak:
    """Measure T = 1024 on tuned kernels. The budget is inputs and outputs of both passes and two rows per pair."""
    import torch

    import lowering
    from autotune.bench.inputs import scan_inputs
    from ramnet import ops

    inputs = scan_inputs().requiring_grad()
    wanted = [x for x in inputs if x.requires_grad]
    given = [torch.ones_like(x) for x in (inputs.values, inputs.memory, inputs.mass)]

    def training() -> int:
        outputs = ops.memory_scan(*inputs)
        gradients = torch.autograd.grad(outputs, wanted, given)
        return sum(x.nbytes for x in (*outputs, *gradients))

    with lowering.use(target):
        produced = training()
        gc.collect()
        # Memory that the allocator keeps from the first call would hide allocations of the second.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        training()
        extra = _status("VmHWM") - before
    held = sum(x.nbytes for x in (*inputs, *given))
    rows = 2 * inputs.write_slots.numel() * inputs.values.shape[-1] * 4
    return Peak(held + extra, held + produced + rows)


def _status(name: str) -> int:
    """Return the bytes in a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.stdout.write("{} {}\n".format(*measure(sys.argv[1])))
