"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from ramnet import ops

# Examples are the same at each run; a kernel's first call compiles, so there is no deadline.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(params=["", "cpu"], ids=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the reference and on the CPU kernels, with every torch.empty filled with NaN."""
    if request.param:
        pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
        if importlib.util.find_spec("lowering.cpu") is None:
            pytest.skip("lowering.cpu is not there yet")
    torch.use_deterministic_algorithms(True)
    try:
        with ops.using(request.param):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(False)
