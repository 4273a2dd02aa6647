"""Forward scan, parallel over slots as in the paper: accesses are sorted by slot and time and scanned in pieces."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.memory_scan.slots.pieces import access, load_row, point, store_row
from lowering.gpu.memory_scan.slots.walk import Pieces, Scratch, prepare_pieces, sum_parts
from lowering.gpu.plan import Launch, Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.copying import copy
from lowering.gpu.triton.launch import TritonLaunch
from ramnet.ops.reference import sum_type
from schedules.gpu.slots import BATCH, SlotsScan


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def slot_scan(
    packed, starts, ends, decays, weights, values, memory, rows, parts, new_memory, T, M, pieces, all_pieces,
    K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scan each piece from the row before it. Computes parts [N·T·K, D], r/(z + ε) · row of each read, and the final
    memory."""
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    x = load_row(point(rows, piece.to(tl.int64), D, D_PAD), piece * 0, alive, D, D_PAD, ACC)
    value_rows, part_rows = point(values, head * T, D, D_PAD), point(parts, head * T * K, D, D_PAD)
    memory_rows, new_rows = point(memory, head * M, D, D_PAD), point(new_memory, head * M, D, D_PAD)
    at = piece.to(tl.int64) * PIECE
    for _ in range(0, PIECE // BATCH):
        # All loads of a batch are issued before its stores, because no load can pass a store.
        loaded = ()
        for j in tl.static_range(BATCH):
            writes, reads, token, place = access(packed + at + j, alive, K)
            start = tl.load(starts + at + j, mask=alive, other=-1)
            end = tl.load(ends + at + j, mask=alive, other=-1)
            factor = tl.load(decays + at + j, mask=alive, other=1.0)
            weight = tl.load(weights + at + j, mask=alive, other=0.0)
            term = tl.where(writes, weight, 0.0)[:, None] * load_row(value_rows, token, writes, D, D_PAD, ACC)
            place = tl.where(reads, place, -1)
            loaded += ((place, start, end, factor, weight, term),)
        for j in tl.static_range(BATCH):
            place, start, end, factor, weight, term = loaded[j]
            first = load_row(memory_rows, start, start >= 0, D, D_PAD, ACC)
            x = factor[:, None] * tl.where(start[:, None] >= 0, first, x) + term
            store_row(part_rows, place, place >= 0, weight[:, None] * x, D, D_PAD)
            store_row(new_rows, end, end >= 0, x, D, D_PAD)
        at += BATCH


def plan(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, values: Tensor,
    memory: Tensor, mass: Tensor, decay_power: float, eps: float, schedule: SlotsScan,
) -> Plan:  # fmt: skip
    """Plan steps 5 and 6 of the paper on slots and weights [N, T, K], values [N, T, D], memory [N, M, D], mass [N, M].

    The results are output [N, T, D] of the dtype of ``values``, and the new state of the dtype of ``memory``.
    """
    heads, tokens, top_k = write_slots.shape
    num_slots, dim = memory.shape[1:]
    group = min(heads, schedule.heads or heads)
    acc = sum_type(values, write_weights, memory)
    output, new_memory, new_mass = (x.new_empty(x.shape) for x in (values, memory, mass))
    launches = [copy(memory, new_memory), copy(mass, new_mass)]
    scratch: Scratch | None = None
    for first in range(0, heads, group):
        some = slice(first, first + group)
        inputs = [x[some] for x in (write_slots, write_weights, read_slots, read_weights, values, memory, mass)]
        walk = Pieces(
            len(inputs[0]), tokens, top_k, num_slots, dim, acc, schedule.piece, schedule.threads, schedule.channels
        )
        scratch = scratch or Scratch(walk, write_slots, backward=False)
        launches += prepare_pieces(walk, scratch, inputs, decay_power, eps, new_mass=new_mass[some])
        launches.append(_scan(walk, scratch, inputs[4], inputs[5], new_memory[some]))
        launches.append(sum_parts(walk, scratch.parts, output[some]))
    return Plan(tuple(launches), (output, new_memory, new_mass))


def _scan(walk: Pieces, scratch: Scratch, values: Tensor, memory: Tensor, new_memory: Tensor) -> Launch:
    arguments = {
        **scratch.named("packed", "starts", "ends", "decays", "weights", "rows", "parts"),
        "values": values, "memory": memory, "new_memory": new_memory, **walk.constants(),
    }  # fmt: skip
    coefficients = (12 + 2 * walk.acc_size) * walk.positions
    moved = coefficients + 2 * walk.state_traffic(memory) + walk.row_bytes + walk.part_bytes
    work = Work(
        walk.programs, walk.threads, moved + values.numel() * values.element_size(), moved + walk.row_traffic(values),
        steps=walk.piece / BATCH, trips=2,
    )  # fmt: skip
    return TritonLaunch(slot_scan, (walk.programs,), arguments, walk.threads, work)
