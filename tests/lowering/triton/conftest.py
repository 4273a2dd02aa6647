"""Fixtures for tests of the Triton kernels: interpreted on the CPU, or run where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowering import targets

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'ramnet[gpu]'")


@pytest.fixture
def device() -> Iterator[str]:
    """Where inputs go; every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield "cuda" if torch.cuda.is_available() else "cpu"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def warp() -> int:
    """Threads that run in step on ``device``, for ``Plan.run``."""
    here = targets.here()
    return 32 if here is None or here.gpu is None else here.gpu.warp
