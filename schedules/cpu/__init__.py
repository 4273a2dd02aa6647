"""The schedules of the TIR kernels on a CPU: each op's knobs, their values, defaults and rules."""

from __future__ import annotations

from schedules.base import Schedule
from schedules.cpu.address_decode import AddressDecode, AddressDecodeBackward
from schedules.cpu.memory_scan import MemoryScan, MemoryScanBackward
from schedules.cpu.memory_step import MemoryStep

__all__ = [
    "SCHEDULES", "AddressDecode", "AddressDecodeBackward", "MemoryScan", "MemoryScanBackward", "MemoryStep",
]  # fmt: skip

SCHEDULES: dict[str, type[Schedule]] = {
    "address_decode": AddressDecode,
    "address_decode_backward": AddressDecodeBackward,
    "memory_scan": MemoryScan,
    "memory_scan_backward": MemoryScanBackward,
    "memory_step": MemoryStep,
}
