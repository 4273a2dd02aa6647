"""Each kernel at a few sizes against the definition, three times for equal bits.

Kernels run side by side, each in a process of its own, ``python -m autotune.bench.gpu.smoke KERNEL TARGET DEVICE``, so
that one that hangs or faults is known by name and does not affect the others.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from autotune.bench.gpu.run import GpuRun, reason
from autotune.bench.gpu.together import together
from autotune.bench.run import Table
from autotune.measure.problems import TOLERANCE, Problem, relative_rmse
from lowering.gpu.backend import GpuKernels
from lowering.gpu.offline import why_unsupported
from schedules.base import Schedule
from schedules.gpu import SCHEDULES
from schedules.workload import AXES, Op, Workload

# A small odd size, and those of a layer of "340m" at few tokens in float32 and at more in bfloat16.
SIZES: tuple[tuple[dict[str, int], str, float], ...] = (
    ({"N": 3, "T": 37, "K": 3, "M": 27, "D": 12, "U": 3, "P": 3, "R": 101}, "float32", 0.5),
    ({"N": 32, "T": 257, "K": 8, "M": 1024, "D": 64, "U": 5, "P": 4, "R": 4097}, "float32", 1.0),
    ({"N": 64, "T": 1061, "K": 8, "M": 1024, "D": 64, "U": 5, "P": 4, "R": 16385}, "bfloat16", 1.0),
)
# For the interpreter.
TINY = (({"N": 2, "T": 3, "K": 2, "M": 9, "D": 4, "U": 2, "P": 3, "R": 3}, "float32", 1.0),)
RUNS = 3
# The share of the part's time for the kernels' processes.
SHARE = 0.9
WRONG, DIFFERS = "kernels that fail the smoke test", "kernels whose runs differ in a bit"


class Kernel(NamedTuple):
    """A kernel of an op: its form, "" for an op with one, and its compiler."""

    op: Op
    form: str
    compiler: str

    def __str__(self) -> str:
        return ",".join(self)


def kernels() -> list[Kernel]:
    """Return the kernels of every op."""
    found = []
    for op, forms in SCHEDULES.items():
        for form, kind in forms.items():
            given: Any = getattr(kind, "compiler", None)  # none if the compiler is a knob
            found += [Kernel(op, form, each) for each in ((given,) if given else ("triton", "tir"))]  # type: ignore[arg-type]
    return found


def workloads(op: Op, device: str = "cuda") -> list[Workload]:
    """Return the op at the sizes of ``SIZES``, or of ``TINY`` for the interpreter on a CPU."""
    found = []
    for sizes, dtype, decay_power in TINY if device == "cpu" else SIZES:
        constants = {}
        if not op.startswith("address_decode"):
            constants = {"decay_power": decay_power, "eps": 1e-6}
            constants |= {"proxy_eps": 0.01} if op == "memory_scan_backward" else {}
        found.append(Workload.of(op, [sizes[axis] for axis in AXES[op]], dtype, constants))
    return found


def schedule(kernel: Kernel, workload: Workload) -> Schedule | None:
    """Return the kernel's default schedule; None if none is valid."""
    kind = SCHEDULES[kernel.op][kernel.form]
    knobs = {"compiler": kernel.compiler} if "compiler" in kind.model_fields else {}
    default = kind.default(workload).model_copy(update=knobs)
    return default if default.refusal(workload) is None else None


def smoke(run: GpuRun) -> list[Table]:
    """Add a notice for each kernel and size, and the number of kernels that failed or whose runs differ as facts."""
    commands = {
        str(kernel): [sys.executable, "-m", "autotune.bench.gpu.smoke", str(kernel), run.target, run.device]
        for kernel in kernels()
    }
    run.on_step(f"{len(commands)} kernels")
    with tempfile.TemporaryDirectory() as folder:
        ended = together(commands, SHARE * run.seconds, Path(folder))
        wrong, differ = 0, 0
        for name, status in ended.items():
            found = [json.loads(line) for line in (Path(folder) / f"{name}.out").read_text().splitlines()]
            if status != 0:
                said = (Path(folder) / f"{name}.err").read_text(errors="replace").strip().splitlines()
                how = f"took longer than {SHARE * run.seconds:.0f} s" if status is None else f"exit status {status}"
                found.append({"size": f"size {len(found) + 1}", "failed": f"{how}; {said[-1] if said else ''}"})
            wrong += any("failed" in each for each in found)
            differ += any(each.get("equal") is False for each in found)
            for each in found:
                run.notice(f"smoke, {name}, {each.pop('size')}: {_said(each)}")
    run.facts |= {WRONG: float(wrong), DIFFERS: float(differ), "kernels in the smoke test": float(len(ended))}
    return []


def _said(found: dict[str, Any]) -> str:
    if "error" not in found:
        return next(f"{name.upper()}: {value}" for name, value in found.items())
    bits = "equal bits" if found["equal"] else "BITS DIFFER between runs"
    failed = f"FAILED: {found['failed']}; " if "failed" in found else ""
    return f"{failed}error {found['error']:.1e}, {bits}, {found['seconds']:.1f} s"


def tried(kernel: Kernel, target: str, device: str) -> Iterator[dict[str, Any]]:
    """Yield what is found at each size: an error and whether the bits were equal, or why there is none."""
    for workload in workloads(kernel.op, device):
        begin = perf_counter()
        found: dict[str, Any] = {"size": workload.name.partition(" ")[2]}
        chosen = schedule(kernel, workload)
        missing = "no schedule is valid" if chosen is None else None
        if chosen is not None and device != "cpu":
            missing = why_unsupported(chosen, target, workload)
        if chosen is None or missing is not None:
            yield found | {"left out": missing}
            continue
        try:
            problem = Problem(workload, device=device)
            backend = GpuKernels(target, given={workload.op: chosen})
            runs = [problem.answer(backend, problem.arguments) for _ in range(RUNS)]
            error = max(map(relative_rmse, runs[0], problem.expected))
        except Exception as raised:  # noqa: BLE001 whatever a kernel raises is what there is to say of it
            yield found | {"failed": f"{type(raised).__name__}: {reason(raised)}"}
            if not isinstance(raised, (ValueError, ImportError)):
                return  # after a fault, nothing more runs in this process
            continue
        found |= {"error": error, "equal": all(_equal(runs[0], other) for other in runs[1:])}
        if not error <= TOLERANCE[workload.dtype]:
            found["failed"] = f"{TOLERANCE[workload.dtype]:.0e} is allowed"
        yield found | {"seconds": perf_counter() - begin}


def _equal(first: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _main(kernel: str, target: str, device: str) -> None:
    torch.set_num_threads(2)  # of the reference; the other kernels' processes run at the same time
    op, form, compiler = kernel.split(",")
    for found in tried(Kernel(op, form, compiler), target, device):  # type: ignore[arg-type]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(*sys.argv[1:])
