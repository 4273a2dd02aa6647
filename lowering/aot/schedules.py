"""The schedules of a token's kernels."""

from __future__ import annotations

from typing import NamedTuple

from lowering.aot.machines import Machine
from ramnet.config import RamLayerConfig
from schedules.cpu import AddressDecode, MemoryScan, MemoryStep
from schedules.of_model import of_layer
from schedules.records import choose


class Schedules(NamedTuple):
    """Those of a layer's ops; ``address_decode`` has one for the rows of a token and one for many rows."""

    few: AddressDecode
    many: AddressDecode
    step: MemoryStep
    scan: MemoryScan


def schedules_of(config: RamLayerConfig, machine: Machine) -> Schedules:
    """Return the schedules that records have for a layer on a machine."""
    workloads = of_layer(config)
    by_op = {workload.op: workload for workload in workloads}
    few = next(workload for workload in workloads if workload.op == "address_decode")
    wanted = (few, by_op["address_decode"], by_op["memory_step"], by_op["memory_scan"])
    return Schedules(*(choose(workload, "cpu", machine.device).schedule for workload in wanted))
