"""The schedules of the GPU kernels: Triton kernels, and TIR kernels through CUDA C."""

from __future__ import annotations

from schedules.base import Schedule
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.gpu.serial import SerialScan
from schedules.gpu.shared import SharedScan, SharedScanBackward
from schedules.gpu.slots import SlotsScan
from schedules.gpu.step import DecodeHeads, MemoryStep

# The schedule classes by op and form; "" for an op with one form.
SCHEDULES: dict[str, dict[str, type[Schedule]]] = {
    "address_decode": {"": AddressDecode},
    "address_decode_backward": {"": AddressDecodeBackward},
    "memory_scan": {"serial": SerialScan, "slots": SlotsScan, "shared": SharedScan},
    "memory_scan_backward": {"slots": SlotsScan, "shared": SharedScanBackward},
    "memory_step": {"": MemoryStep},
    "decode_heads": {"": DecodeHeads},
}
