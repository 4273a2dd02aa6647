"""Knobs of the GPU kernels that scan a sequence."""

from __future__ import annotations

from typing import Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu import serial, shared, slots
from schedules.workload import Workload

# serial: Triton, a program owns a head's channels and walks through time, its state in the L2 cache.
# slots: Triton, accesses sorted by slot and time, slots scanned side by side (the paper's way).
# shared: TIR, serial in time with the state in shared memory.
Form = Literal["serial", "slots", "shared"]
SPANS = (1, 2, 4, 8, 16, 32)


class _Scan(Schedule):
    """What both directions have in common. Knobs that a form has no use for keep their default."""

    form: Form = "serial"
    tile: int = 64  # channels a program
    threads: int = 64  # of a program
    piece: int = 64  # slots: accesses in sorted order that a program walks through
    channels: int = 4  # slots: of a row that a thread holds
    # slots, memory against launches: heads whose rows are held at a time; 0 for all.
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

    def refuse_idle(self, *used: str) -> str | None:
        """A sentence where a knob that the form has no use for is not at its default."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in ("form", *used) and value != field.default:
                return f"{name} is {value}, which form {self.form} has no use for; it must stay {field.default}"
        return None


class MemoryScan(_Scan):
    """Forward scan."""

    def refusal(self, workload: Workload) -> str | None:
        if self.form == "shared":
            return self.refuse_idle("tile", "slot_lanes", "chunk") or shared.refuse_forward(workload, self)
        if self.form == "serial":
            return self.refuse_idle("tile", "threads", "spans") or serial.refuse(workload, self)
        return self.refuse_idle("threads", "piece", "channels", "heads") or slots.refuse(workload, self)


class MemoryScanBackward(_Scan):
    """Backward scan."""

    # Memory against work: tokens between two copies of the state that the backward starts anew from (serial, shared).
    checkpoint: int = 256

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
        if self.form == "shared":
            used = ("tile", "slot_lanes", "chunk", "checkpoint")
            return self.refuse_idle(*used) or shared.refuse_backward(workload, self, self.checkpoint)
        if self.form == "serial":
            if self.checkpoint < 1:
                return f"checkpoint is {self.checkpoint}; it must be 1 or more"
            return self.refuse_idle("tile", "threads", "spans", "checkpoint") or serial.refuse(workload, self)
        return self.refuse_idle("threads", "piece", "channels", "heads") or slots.refuse(workload, self)


def _threads_for_a_row(workload: Workload, channels: int) -> int:
    """The fewest threads from 64 up that hold a row of the state, each ``channels`` of it."""
    return max(64, 1 << (-(-workload.shape["D"] // channels) - 1).bit_length())
