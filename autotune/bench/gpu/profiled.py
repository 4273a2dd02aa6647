"""Runs an op's chosen kernels once for a profiler: ``python -m autotune.bench.gpu.profiled OP TARGET``."""

from __future__ import annotations

import sys

import torch

from autotune.bench.gpu import candidates
from autotune.measure.problems import Problem
from lowering.gpu.backend import GpuKernels


def _main(op: str, target: str) -> None:
    (workload,) = (each for each in candidates.workloads() if each.op == op)
    call = Problem(workload, device="cuda").call(GpuKernels(target))
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    _main(*sys.argv[1:])
