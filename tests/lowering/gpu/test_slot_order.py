"""The radix sort of accesses against torch.sort."""

from __future__ import annotations

import pytest
import torch

from lowering.gpu.memory_scan.slots.order import DIGIT_BITS, OrderScratch, order, passes
from lowering.targets import Gpu

# (N, T, K, M): one access, one slot, several chunks, passes of different widths, M past 2^20.
SIZES = [(1, 1, 1, 2), (2, 7, 1, 1), (3, 63, 3, 5), (2, 33, 8, 1000), (1, 40, 4, 4**10 + 1)]


@pytest.mark.parametrize(("heads", "tokens", "top_k", "num_slots"), SIZES)
def test_accesses_are_sorted_by_slot_then_time_with_writes_before_reads(
    device: str, gpu: Gpu, heads: int, tokens: int, top_k: int, num_slots: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, tokens, top_k)
    # Few different slots, far apart, so that most occur several times.
    slots = torch.randint(0, min(num_slots, 20), shape, generator=generator) * (num_slots - 1) // 19 % num_slots
    write_slots, read_slots = slots.to(torch.int32).to(device)
    scratch = OrderScratch.of(write_slots, heads, num_slots)
    launches, sorted_slots, events = order(write_slots, read_slots, num_slots, scratch)
    for launch in launches:
        launch.run(gpu)
    expected = torch.cat([write_slots, read_slots], -1).flatten(1).sort(dim=1, stable=True)
    assert torch.equal(sorted_slots, expected.values)
    assert torch.equal(events.long(), expected.indices)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 32, 33, 1024, 4**10, 2**31 - 1])
def test_passes_cover_every_bit_of_a_slot_number_once(num_slots: int) -> None:
    at = 0
    for shift, bits in passes(num_slots):
        assert shift == at and 1 <= bits <= DIGIT_BITS
        at += bits
    assert at == max(1, (num_slots - 1).bit_length())


def test_scratch_does_not_grow_with_the_number_of_slots() -> None:
    slots = torch.empty(1, 1024, 8, dtype=torch.int32, device="meta")
    small, large = (OrderScratch.of(slots, 1, num_slots) for num_slots in (1024, 4**10))
    assert large.counts.numel() <= small.counts.numel()
    assert len(large.pairs) == len(small.pairs) == 2
