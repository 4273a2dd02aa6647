"""Schedules of the GPU scans over slots: valid ones, and refusals with the value."""

from __future__ import annotations

from typing import Any

import pytest

from schedules.gpu import SlotsScan
from schedules.workload import Op, Workload


def refusal(knobs: dict[str, Any], op: Op = "memory_scan", **sizes: int) -> str | None:
    shape = {"N": 16, "T": 4096, "K": 8, "M": 1024, "D": 64} | sizes
    return SlotsScan(**knobs).refusal(Workload(op=op, shape=shape, dtype="bfloat16"))


@pytest.mark.parametrize("op", ["memory_scan", "memory_scan_backward"])
def test_schedules_are_valid_for_the_papers_sizes_and_any_number_of_slots(op: Op) -> None:
    assert refusal({}, op) is None
    assert refusal({"heads": 3, "piece": 128, "threads": 128, "channels": 2}, op, M=4**10, K=1, T=1, D=1) is None


@pytest.mark.parametrize(
    ("knobs", "sizes", "part"),
    [
        ({"piece": 20}, {}, "piece is 20"),
        ({"piece": 0}, {}, "piece is 0"),
        ({"channels": 8}, {}, "channels is 8"),
        ({"heads": -1}, {}, "heads is -1"),
        ({"threads": 48}, {}, "threads is 48"),
        ({"threads": 32, "channels": 1}, {}, "threads · channels is 32"),
        ({}, {"T": 2**28}, "2·T·K = 4294967296"),
        ({}, {"M": 2**25}, "max(M, T·K)·D is 2147483648"),
    ],
)
def test_refusals_name_the_value(knobs: dict[str, int], sizes: dict[str, int], part: str) -> None:
    for op in ("memory_scan", "memory_scan_backward"):
        sentence = refusal(knobs, op, **sizes)
        assert sentence is not None and part in sentence
