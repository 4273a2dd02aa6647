"""Backward of the scan that is parallel over slots.

Along a slot's accesses the gradient of its row is a linear recurrence too, walked back: G_p = decay_(p+1) · G_(p+1), plus
at a read what it took from the row, plus behind the last access the final state's gradient. Each piece is walked
forward once more from the row before it, which shows what its reads take and sums up its way back; then back from G
behind it. Of rows only one per ``BATCH`` accesses is kept between the two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.triton.copying import copy
from lowering.triton.launch import Launch, Plan
from lowering.triton.slot_pieces import BATCH, access, load_row, store_row
from lowering.triton.slot_walk import Scratch, Walk, carries, enter_pieces, sum_parts
from lowering.triton.types import sum_type
from lowering.work import Work
from schedules.gpu.scan import MemoryScanBackward


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def slot_reads(
    told, enters, leaves, decays, weights, values, memory, mass, rows, masses, grad_output, grad_memory, grad_mass,
    spreads, pushes, kept_rows, kept_masses, grad_read, gains, row_sums, mass_sums, T, M, pieces, all_pieces,
    K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    BATCH: tl.constexpr, ACC: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Forward through each piece: the gradients of read weights, what each read adds to G (spread · ∂o) and to the
    mass's gradient (push), row and mass before each batch, and the piece's way back: what G before it is of G behind."""
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    z = tl.load(masses + piece, mask=alive, other=0.0)
    x = load_row(rows, piece.to(tl.int64), alive, D, D_PAD, ACC)
    gain = tl.full([ROWS], 1, ACC)
    y_mass = tl.zeros([ROWS], ACC)
    y = tl.zeros([ROWS, D_PAD], ACC)
    for start in range(0, PIECE, BATCH):
        batch = piece.to(tl.int64) * (PIECE // BATCH) + start // BATCH
        loaded = ()
        for j in tl.static_range(BATCH):
            at = piece.to(tl.int64) * PIECE + start + j
            writes, reads, row, place = access(told, at, alive, head, T, K)
            enter = tl.load(enters + at, mask=alive, other=-1)
            leave = tl.load(leaves + at, mask=alive, other=-1)
            factor = tl.load(decays + at, mask=alive, other=1.0)
            weight = tl.load(weights + at, mask=alive, other=0.0)
            # A write's value, or the gradient of the output that a read went into.
            token = load_row(values, row, writes, D, D_PAD, ACC) + load_row(grad_output, row, reads, D, D_PAD, ACC)
            loaded += ((tl.where(reads, place, -1), enter, leave, factor, weight, token),)
        store_row(kept_rows, batch, alive, x, D, D_PAD)
        tl.store(kept_masses + batch, z, mask=alive)
        for j in tl.static_range(BATCH):
            at = piece.to(tl.int64) * PIECE + start + j
            read, enter, leave, factor, weight, token = loaded[j]
            reads, enters_here, leaves_here = read >= 0, enter >= 0, leave >= 0
            first = load_row(memory, head * M + enter, enters_here, D, D_PAD, ACC)
            first_mass = tl.load(mass + head * M + enter, mask=enters_here, other=0.0).to(ACC)
            written = tl.where(reads, 0.0, weight)
            x = factor[:, None] * tl.where(enters_here[:, None], first, x) + written[:, None] * token
            z = factor * tl.where(enters_here, first_mass, z) + written

            inverse = 1 / (z + EPS)
            along = tl.sum(x * token, 1)
            spread = tl.where(reads, weight * inverse, 0.0)
            push = -along * spread * inverse
            tl.store(spreads + at, spread, mask=alive)
            tl.store(pushes + at, push, mask=alive)
            tl.store(grad_read + read, (along * inverse).to(grad_read.dtype.element_ty), mask=reads)

            last = load_row(grad_memory, head * M + leave, leaves_here, D, D_PAD, ACC)
            last_mass = tl.load(grad_mass + head * M + leave, mask=leaves_here, other=0.0).to(ACC)
            gain = tl.where(enters_here, 0.0, gain) * factor
            y += gain[:, None] * (spread[:, None] * token + last)
            y_mass += gain * (push + last_mass)
            gain = tl.where(leaves_here, 0.0, gain)
    tl.store(gains + piece, gain, mask=alive)
    tl.store(mass_sums + piece, y_mass, mask=alive)
    store_row(row_sums, piece.to(tl.int64), alive, y, D, D_PAD)


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def slot_writes(
    told, enters, leaves, decays, weights, slopes, values, memory, mass, rows, masses, grad_output, grad_memory,
    grad_mass, spreads, pushes, kept_rows, kept_masses, grad_write, parts, new_grad_memory, new_grad_mass,
    T, M, pieces, all_pieces,
    K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Back through each piece from G behind it: the gradients of write weights, parts [N·T·K, D] = w · G of each
    write, and the gradients of the initial state."""
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    y_mass = tl.load(masses + piece, mask=alive, other=0.0)
    y = load_row(rows, piece.to(tl.int64), alive, D, D_PAD, ACC)
    for step in range(0, PIECE // BATCH):
        start = PIECE - (step + 1) * BATCH
        batch = piece.to(tl.int64) * (PIECE // BATCH) + start // BATCH
        z = tl.load(kept_masses + batch, mask=alive, other=0.0)
        x = load_row(kept_rows, batch, alive, D, D_PAD, ACC)
        loaded = ()
        for j in tl.static_range(BATCH):
            at = piece.to(tl.int64) * PIECE + start + j
            writes, reads, row, place = access(told, at, alive, head, T, K)
            enter = tl.load(enters + at, mask=alive, other=-1)
            factor = tl.load(decays + at, mask=alive, other=1.0)
            weight = tl.where(writes, tl.load(weights + at, mask=alive, other=0.0), 0.0)
            slope = tl.load(slopes + at, mask=alive, other=0.0)
            token = load_row(values, row, writes, D, D_PAD, ACC) + load_row(grad_output, row, reads, D, D_PAD, ACC)
            enters_here = enter >= 0
            first = load_row(memory, head * M + enter, enters_here, D, D_PAD, ACC)
            first_mass = tl.load(mass + head * M + enter, mask=enters_here, other=0.0).to(ACC)
            x = tl.where(enters_here[:, None], first, x)
            z = tl.where(enters_here, first_mass, z)
            # What the write's own weight scales: ∂row/∂w and ∂z/∂w.
            scaled, scaled_mass = token + slope[:, None] * x, 1 + slope * z
            loaded += ((tl.where(writes, place, -1), enter, factor, weight, token, scaled, scaled_mass),)
            x = factor[:, None] * x + weight[:, None] * token
            z = factor * z + weight
        for i in tl.static_range(BATCH):
            at = piece.to(tl.int64) * PIECE + start + BATCH - 1 - i
            write, enter, factor, weight, token, scaled, scaled_mass = loaded[BATCH - 1 - i]
            leave = tl.load(leaves + at, mask=alive, other=-1)
            leaves_here, enters_here, writes = leave >= 0, enter >= 0, write >= 0
            last = load_row(grad_memory, head * M + leave, leaves_here, D, D_PAD, ACC)
            last_mass = tl.load(grad_mass + head * M + leave, mask=leaves_here, other=0.0).to(ACC)
            spread = tl.load(spreads + at, mask=alive, other=0.0)
            y = tl.where(leaves_here[:, None], last, y) + spread[:, None] * token
            y_mass = tl.where(leaves_here, last_mass, y_mass) + tl.load(pushes + at, mask=alive, other=0.0)

            grad = tl.sum(y * scaled, 1) + y_mass * scaled_mass
            tl.store(grad_write + write, grad.to(grad_write.dtype.element_ty), mask=writes)
            store_row(parts, write, writes, weight[:, None] * y, D, D_PAD)
            y = factor[:, None] * y
            y_mass = factor * y_mass
            store_row(new_grad_memory, head * M + enter, enters_here, y, D, D_PAD)
            tl.store(new_grad_mass + head * M + enter, y_mass.to(new_grad_mass.dtype.element_ty), mask=enters_here)


def plan(
    grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor, write_slots: Tensor, write_weights: Tensor,
    read_slots: Tensor, read_weights: Tensor, values: Tensor, memory: Tensor, mass: Tensor, decay_power: float,
    eps: float, proxy_eps: float, schedule: MemoryScanBackward,
) -> Plan:  # fmt: skip
    """Gradients of write_weights and read_weights [N, T, K], values [N, T, D], memory [N, M, D] and mass [N, M].

    ``grad_output``, ``grad_memory`` and ``grad_mass`` are those of what ``memory_scan_slots.plan`` puts out. The
    derivative of the decay is the proxy's (paper, step 7).
    """
    heads, tokens, top_k = write_slots.shape
    group = min(heads, schedule.heads or heads)
    acc = sum_type(values, write_weights, memory)
    outputs = [x.new_empty(x.shape) for x in (write_weights, read_weights, values, memory, mass)]
    launches = [copy(grad_memory, outputs[3]), copy(grad_mass, outputs[4])]
    scratch: _Scratch | None = None
    for first in range(0, heads, group):
        some = slice(first, first + group)
        inputs = [x[some] for x in (write_slots, write_weights, read_slots, read_weights, values, memory, mass)]
        given = [x[some] for x in (grad_output, grad_memory, grad_mass)]
        walk = Walk(len(inputs[0]), tokens, top_k, *memory.shape[1:], acc, schedule.piece, schedule.threads,
                    schedule.channels)  # fmt: skip
        scratch = scratch or _Scratch(walk, write_slots)
        launches += enter_pieces(walk, scratch, *inputs, decay_power, proxy_eps)
        launches += _way_back(walk, scratch, *inputs[4:], *given, *(x[some] for x in outputs), eps)
    return Plan(tuple(launches), tuple(outputs))


class _Scratch(Scratch):
    """Also, of N heads padded to whole pieces: spreads, pushes; of their batches: kept_masses, and kept_rows with D."""

    def __init__(self, walk: Walk, slots: Tensor) -> None:
        super().__init__(walk, slots, slope=True)
        batches = walk.positions // BATCH
        self.spreads, self.pushes = (slots.new_empty(walk.positions, dtype=walk.acc) for _ in range(2))
        self.kept_rows = slots.new_empty(batches, walk.dim, dtype=walk.acc)
        self.kept_masses = slots.new_empty(batches, dtype=walk.acc)


def _way_back(
    walk: Walk, scratch: _Scratch, values: Tensor, memory: Tensor, mass: Tensor, grad_output: Tensor,
    grad_memory: Tensor, grad_mass: Tensor, grad_write: Tensor, grad_read: Tensor, grad_values: Tensor,
    new_grad_memory: Tensor, new_grad_mass: Tensor, eps: float,
) -> list[Launch]:  # fmt: skip
    """From the row before each piece to the gradients of a group of heads."""
    shared = {
        **scratch.positions("told", "enters", "leaves", "decays", "weights", "rows", "masses", "spreads", "pushes",
                            "kept_rows", "kept_masses"),
        "values": values, "memory": memory, "mass": mass, "grad_output": grad_output, "grad_memory": grad_memory,
        "grad_mass": grad_mass, **walk.constants(),
    }  # fmt: skip
    reads = {**shared, **scratch.positions("gains", "row_sums", "mass_sums"), "grad_read": grad_read, "EPS": eps}
    writes = {
        **shared, **scratch.positions("slopes", "parts"), "grad_write": grad_write,
        "new_grad_memory": new_grad_memory, "new_grad_mass": new_grad_mass,
    }  # fmt: skip
    tokens = sum(x.numel() * x.element_size() for x in (values, grad_output))
    gathered = walk.row_traffic(values) + walk.row_traffic(grad_output)
    kept = walk.positions // BATCH * (walk.dim + 1) * walk.acc_size
    state = walk.state_traffic(memory)
    weights = grad_read.numel() * grad_read.element_size()
    # A gradient of a weight that is scattered costs a sector of 32 bytes.
    sectors = 32 * grad_read.numel()
    there = (12 + 4 * walk.acc_size) * walk.positions + kept + 2 * state + 2 * walk.row_bytes
    back = (12 + 5 * walk.acc_size) * walk.positions + kept + 3 * state + walk.row_bytes + walk.part_bytes
    lanes = walk.positions * walk.d_pad
    steps = walk.piece / BATCH
    return [
        Launch(slot_reads, (walk.programs,), reads, walk.threads,
               Work(walk.programs, walk.threads, there + tokens + weights, there + gathered + sectors, 24 * lanes,
                    steps, trips=2)),
        carries(walk, scratch, reverse=True),
        Launch(slot_writes, (walk.programs,), writes, walk.threads,
               Work(walk.programs, walk.threads, back + tokens + weights, back + gathered + sectors, 24 * lanes,
                    steps, trips=3)),
        sum_parts(walk, scratch.parts, grad_values),
    ]  # fmt: skip
