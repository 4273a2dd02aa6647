"""memory_step: one token of the scan in place, with one program per head (paper, steps 5 and 6).

All loads of the state come before all stores, with a barrier between, so that a token waits for its state once. A slot
that is both written and read is read from registers, rounded as it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.memory_step.work import operand_bytes, state_bytes
from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.arithmetic import decay
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.types import in_triton
from ramnet.ops.reference import sum_type
from schedules.gpu.step import MemoryStep

# Numbers that a thread holds of one tile of rows; it holds two tiles.
_HELD = 32


@triton.jit
def step_head(
    write_slots, write_weights, read_slots, read_weights, values, memory, mass, output, D: tl.constexpr,
    TILE: tl.constexpr, POWER: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Run one token of a head.

    Args:
        write_slots, write_weights, read_slots, read_weights: tensors [W] with W ≥ K, weights of dtype ACC. Unused
            entries have weight 0 and a negative slot, which differs between writes and reads.
        values, memory, mass, output: pointers to the head's [D], [M, D], [M] and [D].
    """
    same = read_slots[:, None] == write_slots[None, :]  # [W, W]
    # A read is fresh if this token writes the same slot, else stale.
    fresh = tl.max(same.to(tl.int32), 1) > 0
    written, stale = write_slots >= 0, (read_slots >= 0) & (fresh == 0)
    write_rows, read_rows = write_slots.to(tl.int64) * D, read_slots.to(tl.int64) * D
    kept = decay(write_weights, POWER)
    z = kept * tl.load(mass + write_slots, mask=written, other=0).to(ACC) + write_weights
    z = z.to(mass.dtype.element_ty)
    old_z = tl.load(mass + read_slots, mask=stale, other=1).to(ACC)
    read_z = tl.where(fresh, tl.sum(tl.where(same, z.to(ACC)[None, :], 0), 1), old_z)
    factors = read_weights / (read_z + EPS)
    fresh_factors = tl.sum(tl.where(same, factors[:, None], 0), 0)
    for first in range(0, D, TILE):
        channel = first + tl.arange(0, TILE)
        inside = channel < D
        write_at = memory + write_rows[:, None] + channel[None, :]
        may_write = written[:, None] & inside[None, :]
        value = tl.load(values + channel[None, :], mask=inside[None, :], other=0).to(ACC)
        rows = tl.load(write_at, mask=may_write, other=0).to(ACC)
        read_at = memory + read_rows[:, None] + channel[None, :]
        old_rows = tl.load(read_at, mask=stale[:, None] & inside[None, :], other=0).to(ACC)
        tl.debug_barrier()
        rows = (kept[:, None] * rows + write_weights[:, None] * value).to(memory.dtype.element_ty)
        tl.store(write_at, rows, mask=may_write)
        # Unread rows are selected away, not multiplied by 0: they may hold an infinity.
        seen = tl.where(fresh_factors[:, None] != 0, fresh_factors[:, None] * rows.to(ACC), 0)
        found = tl.sum(seen + factors[:, None] * old_rows, 0)
        tl.store(output + channel, found.to(output.dtype.element_ty), mask=inside)
        tl.debug_barrier()
    tl.store(mass + write_slots, z, mask=written)


@triton.jit
def memory_step(
    write_slots, write_weights, read_slots, read_weights, values, memory, mass, output, M: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, POWER: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Compute output [N, D], updating memory [N, M, D] and mass [N, M] in place."""
    head = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, W)
    taken = place < K
    at = head * K + place
    step_head(
        tl.load(write_slots + at, mask=taken, other=-1), tl.load(write_weights + at, mask=taken, other=0).to(ACC),
        tl.load(read_slots + at, mask=taken, other=-2), tl.load(read_weights + at, mask=taken, other=0).to(ACC),
        values + head * D, memory + head * M * D, mass + head * M, output + head * D, D, TILE, POWER, EPS, ACC,
    )  # fmt: skip


def plan(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, values: Tensor,
    memory: Tensor, mass: Tensor, decay_power: float, eps: float, schedule: MemoryStep,
) -> Plan:  # fmt: skip
    """Plan output [N, D] of the dtype of ``values``, updating ``memory`` [N, M, D] and ``mass`` [N, M] in place.

    Args:
        write_slots, write_weights, read_slots, read_weights: [N, K], slots int32 and distinct.
        values: [N, D].
    """
    heads, top_k = write_slots.shape
    slots, width = memory.shape[1:]
    output = values.new_empty(values.shape)
    channels = tile(top_k, width, schedule.threads)
    arguments = {
        "write_slots": write_slots, "write_weights": write_weights, "read_slots": read_slots,
        "read_weights": read_weights, "values": values, "memory": memory, "mass": mass, "output": output, "M": slots,
        "K": top_k, "D": width, "W": triton.next_power_of_2(top_k), "TILE": channels,
        "POWER": decay_power, "EPS": eps, "ACC": in_triton(sum_type(values, write_weights, memory)),
    }  # fmt: skip
    moved = operand_bytes(heads, top_k, width, values.element_size())
    moved += state_bytes(heads, top_k, width, memory.element_size())
    work = Work(
        programs=heads, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        trips=2, barriers=2, iterations=(triton.cdiv(width, channels),),
    )  # fmt: skip
    return Plan((TritonLaunch(memory_step, (heads,), arguments, schedule.threads, work),), (output,))


def tile(top_k: int, width: int, threads: int) -> int:
    """Return the channels of a tile of rows: all D if a thread's part fits in its registers."""
    held = max(16, _HELD * threads // triton.next_power_of_2(top_k))
    return min(triton.next_power_of_2(width), held)
