"""Large tensors move to huge pages without changing, where the system can."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowering.model import huge_pages
from lowering.model.huge_pages import HUGE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system has no /proc/self/smaps")


def huge_bytes(tensor: Tensor) -> int:
    """Return the bytes in huge pages of the mapping that holds the tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no mapping holds the tensor")


def tensor_of(size: int) -> Tensor:
    return torch.arange(size // 4, dtype=torch.float32)


def test_a_large_tensor_is_moved_with_its_values_at_its_address() -> None:
    tensor = tensor_of(8 * HUGE)
    if huge_bytes(tensor):
        pytest.skip("the system uses huge pages by itself")
    address = tensor.data_ptr()
    huge_pages.collapse([tensor])
    if not huge_bytes(tensor):
        pytest.skip("the system cannot move memory to huge pages")
    assert huge_bytes(tensor) >= 7 * HUGE
    assert tensor.data_ptr() == address and torch.equal(tensor, tensor_of(8 * HUGE))


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int, int]]:
    """The beginning, size and advice of each call of a system that refuses all of them."""
    calls: list[tuple[int | None, int, int]] = []

    class System:
        def __init__(self, _: None) -> None: ...
        def madvise(self, begin: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
            calls.append((begin.value, size.value, advice))
            return -1

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", System)
    return calls


def test_other_tensors_are_left_alone(advised: list[tuple[int | None, int, int]]) -> None:
    large = tensor_of(2 * HUGE)
    huge_pages.collapse([tensor_of(HUGE // 2), large.to("meta"), large.bfloat16(), large.view(2, -1).t()])
    assert advised == []
    huge_pages.collapse([large])
    assert {advice for *_, advice in advised} == {25}, "an error of the system is no fault"


@pytest.mark.parametrize("offset", [0, 4, HUGE - 4])
def test_all_pages_that_hold_a_part_of_the_tensor_are_given(
    advised: list[tuple[int | None, int, int]], offset: int
) -> None:
    room = tensor_of(5 * HUGE)
    first = -(-room.data_ptr() // HUGE) * HUGE
    tensor = room[(first + offset - room.data_ptr()) // 4 :][: HUGE // 4 + 2]
    huge_pages.collapse([tensor])
    pages = range(2 if offset < HUGE - 4 else 3)
    assert [(begin, size) for begin, size, _ in advised] == [(first + i * HUGE, HUGE) for i in pages]
