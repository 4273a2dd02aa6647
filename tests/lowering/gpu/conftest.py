"""Fixtures for tests of the GPU kernels: interpreted on the CPU, or run where there is a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowering import targets

# Without Triton (pip install 'ramnet[gpu]'), only the tests of TIR's kernels and of the driver run.
if importlib.util.find_spec("triton") is None:
    there = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    collect_ignore = sorted(there - {"test_driver.py", "test_tir_cuda.py", "test_tir_gpu.py"})


@pytest.fixture
def device() -> Iterator[str]:
    """The device of inputs; every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield "cuda" if torch.cuda.is_available() else "cpu"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu() -> targets.Gpu:
    """The GPU for ``Plan.run``: this machine's, or any for the interpreter."""
    here = targets.here()
    return targets.gpu_of("h100") if here is None or here.gpu is None else here.gpu
