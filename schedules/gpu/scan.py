"""Knobs of the GPU kernels that scan a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu import serial, shared, slots
from schedules.gpu.slots import refuse_heads
from schedules.workload import Workload

# serial: Triton, a program owns a head's channels and walks through time, its state in the L2 cache.
# slots: Triton, accesses sorted by slot and time, slots scanned side by side (the paper's way).
# shared: TIR, serial in time, a warp walks with a tile of channels of the state in shared memory.
Form = Literal["serial", "slots", "shared"]
SPANS = (1, 2, 4, 8, 16, 32)


class _Scan(Schedule):
    """What both directions have in common. Knobs that a form has no use for keep their default."""

    # By form, the knobs that it has a use for.
    used: ClassVar[Mapping[str, frozenset[str]]] = {}

    form: Form = "serial"
    tile: int = 64  # channels a program
    threads: int = 64  # of a program
    piece: int = 64  # slots: accesses in sorted order that a program walks through
    channels: int = 4  # slots, shared: of a row that a thread holds
    # Memory against launches: heads whose rows are kept at a time; 0 for all (slots, and shared's backward).
    heads: int = 0
    spans: int = 1  # serial: parts of the sequence whose mass is walked side by side
    slot_lanes: int = 1  # shared: parts of a token's K slots that threads work on side by side
    chunk: int = 16  # shared: tokens whose operands are held in shared memory

    @property
    def compiler(self) -> str:
        """What the other ops' schedules have as a knob."""
        return "tir" if self.form == "shared" else "triton"

    @classmethod
    def default(cls, workload: Workload) -> Self:
        if serial.refuse_top_k(workload):
            return cls(form="slots", threads=_threads_for_a_row(workload, cls().channels))
        return cls(spans=serial.spans(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"form": ("serial", "slots", "shared"), "tile": (8, 16, 32, 64, 128), "threads": (32, 64, 128),
                "piece": (32, 64, 128, 256), "channels": (1, 2, 4), "heads": (0, 16, 64),
                "spans": SPANS, "slot_lanes": shared.SLOT_LANES, "chunk": shared.CHUNKS}  # fmt: skip

    @classmethod
    def idle(cls, chosen: Mapping[str, Any]) -> frozenset[str]:
        used = cls.used.get(chosen.get("form", ""))
        return frozenset() if used is None else frozenset(cls.model_fields) - used - {"form"}

    def refuse_idle(self) -> str | None:
        """A sentence where a knob that the form has no use for is not at its default."""
        for name in sorted(self.idle({"form": self.form})):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                return f"{name} is {value}, which form {self.form} has no use for; it must stay {default}"
        return None

    def refusal(self, workload: Workload) -> str | None:
        if self.refuse_idle():
            return self.refuse_idle()
        if self.form == "slots":
            return slots.refuse(workload, self)
        return serial.refuse(workload, self) if self.form == "serial" else self.refuse_shared(workload)

    def refuse_shared(self, workload: Workload) -> str | None:
        """Likewise, of form shared."""
        raise NotImplementedError


class MemoryScan(_Scan):
    """Forward scan."""

    used: ClassVar = {
        "serial": frozenset({"tile", "threads", "spans"}),
        "slots": frozenset({"threads", "piece", "channels", "heads"}),
        "shared": frozenset({"channels", "slot_lanes", "chunk"}),
    }

    def refuse_shared(self, workload: Workload) -> str | None:
        return shared.refuse(workload, self, shared.FORWARD)


class MemoryScanBackward(_Scan):
    """Backward scan."""

    # Memory against work: tokens between two copies of the state that the backward starts anew from (serial).
    checkpoint: int = 256

    used: ClassVar = {
        "serial": MemoryScan.used["serial"] | {"checkpoint"},
        "slots": MemoryScan.used["slots"],
        "shared": MemoryScan.used["shared"] | {"heads"},
    }

    @classmethod
    def default(cls, workload: Workload) -> Self:
        chosen = super().default(workload)
        if chosen.form == "serial":
            return chosen.model_copy(update={"checkpoint": serial.checkpoint(workload)})
        return chosen

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        checkpoints = tuple(sorted({64, 256, 1024, 4096, serial.checkpoint(workload)}))
        return super().space(workload) | {"checkpoint": checkpoints}

    def refusal(self, workload: Workload) -> str | None:
        if self.checkpoint < 1:
            return f"checkpoint is {self.checkpoint}; it must be 1 or more"
        return super().refusal(workload)

    def refuse_shared(self, workload: Workload) -> str | None:
        refused = refuse_heads(self.heads) or shared.refuse(workload, self, shared.RECOMPUTE)
        return refused or shared.refuse(workload, self, shared.REVERSE)


def _threads_for_a_row(workload: Workload, channels: int) -> int:
    """The fewest threads from 64 up that hold a row of the state, each ``channels`` of it."""
    return max(64, 1 << (-(-workload.shape["D"] // channels) - 1).bit_length())
