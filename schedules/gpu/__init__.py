"""The knobs of each op's GPU kernels: Triton's, and TIR's through CUDA C."""

from __future__ import annotations

from schedules.base import Schedule
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.gpu.scan import MemoryScan, MemoryScanBackward
from schedules.gpu.step import DecodeHeads, MemoryStep

SCHEDULES: dict[str, type[Schedule]] = {
    "address_decode": AddressDecode,
    "address_decode_backward": AddressDecodeBackward,
    "memory_scan": MemoryScan,
    "memory_scan_backward": MemoryScanBackward,
    "memory_step": MemoryStep,
    "decode_heads": DecodeHeads,
}
