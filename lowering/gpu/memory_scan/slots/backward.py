"""Backward of the scan that is parallel over slots.

Along a slot's accesses, the gradient of its row is a linear recurrence in reverse: G_p = decay_(p+1) · G_(p+1), plus
the gradient from a read at p, plus the final state's gradient after the last access. Each piece is first recomputed
from the row before it, which gives the products of its reads and the piece's effect on G; then it is run in reverse
from G after it. Between these two kernels, only one row per ``BATCH`` accesses is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.memory_scan.slots.masses_backward import mass_reads, mass_writes
from lowering.gpu.memory_scan.slots.pieces import access, load_row, point, store_row
from lowering.gpu.memory_scan.slots.walk import MASS_THREADS, Pieces, Scratch, carries, prepare_pieces, sum_parts
from lowering.gpu.plan import Launch, Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.copying import copy
from lowering.gpu.triton.launch import TritonLaunch
from ramnet.ops.reference import sum_type
from schedules.gpu.slots import BATCH, SlotsScan


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def slot_reads(
    packed, starts, ends, decays, weights, values, memory, rows, grad_output, grad_memory, products, kept_rows,
    row_sums, T, M, pieces, all_pieces,
    K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Run each piece forward. Computes products ⟨∂o, row⟩ of reads, the row before each batch, and row_sums, what the
    piece adds to G in reverse."""
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    lane = tl.arange(0, D_PAD)
    x = load_row(point(rows, piece.to(tl.int64), D, D_PAD), piece * 0, alive, D, D_PAD, ACC)
    value_rows, grad_rows = point(values, head * T, D, D_PAD), point(grad_output, head * T, D, D_PAD)
    memory_rows, last_rows = point(memory, head * M, D, D_PAD), point(grad_memory, head * M, D, D_PAD)
    kept = point(kept_rows, piece.to(tl.int64) * (PIECE // BATCH), D, D_PAD)
    at = piece.to(tl.int64) * PIECE
    gain = tl.full([ROWS], 1, ACC)
    y = tl.zeros([ROWS, D_PAD], ACC)
    for batch in range(0, PIECE // BATCH):
        loaded = ()
        for j in tl.static_range(BATCH):
            writes, reads, token, _ = access(packed + at + j, alive, K)
            start = tl.load(starts + at + j, mask=alive, other=-1)
            end = tl.load(ends + at + j, mask=alive, other=-1)
            factor = tl.load(decays + at + j, mask=alive, other=1.0)
            weight = tl.load(weights + at + j, mask=alive, other=0.0)
            # The value of a write, or the gradient of the output for a read.
            row = load_row(value_rows, token, writes, D, D_PAD, ACC) + load_row(grad_rows, token, reads, D, D_PAD, ACC)
            written, read = tl.where(writes, weight, 0.0), tl.where(reads, weight, 0.0)
            loaded += ((written, read, start, end, factor, row),)
        store_row(kept, piece * 0 + batch, alive, x, D, D_PAD)
        found = tl.zeros([ROWS, D_PAD], ACC)
        for j in tl.static_range(BATCH):
            written, read, start, end, factor, row = loaded[j]
            begins, stops = start >= 0, end >= 0
            first = load_row(memory_rows, start, begins, D, D_PAD, ACC)
            x = factor[:, None] * tl.where(start[:, None] >= 0, first, x) + written[:, None] * row
            found = tl.where(lane[None, :] == j, tl.sum(x * row, 1)[:, None], found)
            last = load_row(last_rows, end, stops, D, D_PAD, ACC)
            gain = tl.where(begins, 0.0, gain) * factor
            pulled = read[:, None] * row + last
            y += tl.where(gain[:, None] == 0, 0.0, gain[:, None] * pulled)
            gain = tl.where(stops, 0.0, gain)
        # Lane i stores the i-th product of the batch.
        to = products + at[:, None] + lane[None, :]
        tl.store(to, found, mask=alive[:, None] & (lane < BATCH)[None, :])
        at += BATCH
    store_row(point(row_sums, piece.to(tl.int64), D, D_PAD), piece * 0, alive, y, D, D_PAD)


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def slot_writes(
    packed, starts, ends, decays, weights, slopes, values, memory, rows, grad_output, grad_memory, products, kept_rows,
    parts, new_grad_memory, T, M, pieces, all_pieces,
    K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Run each piece in reverse from G after it. Computes products ⟨G, ∂row/∂w⟩ and parts [N·T·K, D] = w · G of writes,
    and the gradient of the initial memory."""
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    lane = tl.arange(0, D_PAD)
    y = load_row(point(rows, piece.to(tl.int64), D, D_PAD), piece * 0, alive, D, D_PAD, ACC)
    value_rows, grad_rows = point(values, head * T, D, D_PAD), point(grad_output, head * T, D, D_PAD)
    memory_rows, last_rows = point(memory, head * M, D, D_PAD), point(grad_memory, head * M, D, D_PAD)
    new_rows, part_rows = point(new_grad_memory, head * M, D, D_PAD), point(parts, head * T * K, D, D_PAD)
    kept = point(kept_rows, (piece.to(tl.int64) + 1) * (PIECE // BATCH) - 1, D, D_PAD)
    at = (piece.to(tl.int64) + 1) * PIECE - BATCH
    for batch in range(0, PIECE // BATCH):
        x = load_row(kept, piece * 0 - batch, alive, D, D_PAD, ACC)
        loaded = ()
        for j in tl.static_range(BATCH):
            writes, reads, token, place = access(packed + at + j, alive, K)
            start = tl.load(starts + at + j, mask=alive, other=-1)
            factor = tl.load(decays + at + j, mask=alive, other=1.0)
            weight = tl.load(weights + at + j, mask=alive, other=0.0)
            slope = tl.load(slopes + at + j, mask=writes, other=0.0)
            row = load_row(value_rows, token, writes, D, D_PAD, ACC) + load_row(grad_rows, token, reads, D, D_PAD, ACC)
            first = load_row(memory_rows, start, start >= 0, D, D_PAD, ACC)
            x = tl.where((start >= 0)[:, None], first, x)
            # For a write ∂row/∂w; for a read what it adds to the state's gradient.
            scaled = tl.where(writes[:, None], row + slope[:, None] * x, weight[:, None] * row)
            x = factor[:, None] * x + tl.where(writes, weight, 0.0)[:, None] * row
            place = tl.where(writes, place, -1)
            loaded += ((place, start, factor, weight, scaled),)
        found = tl.zeros([ROWS, D_PAD], ACC)
        for i in tl.static_range(BATCH):
            place, start, factor, weight, scaled = loaded[BATCH - 1 - i]
            end = tl.load(ends + at + (BATCH - 1 - i), mask=alive, other=-1)
            last = load_row(last_rows, end, end >= 0, D, D_PAD, ACC)
            y = tl.where((end >= 0)[:, None], last, y) + tl.where(place[:, None] < 0, scaled, 0.0)
            found = tl.where(lane[None, :] == BATCH - 1 - i, tl.sum(y * scaled, 1)[:, None], found)
            store_row(part_rows, place, place >= 0, weight[:, None] * y, D, D_PAD)
            y = factor[:, None] * y
            store_row(new_rows, start, start >= 0, y, D, D_PAD)
        # Lane i stores the i-th product of the batch.
        to = products + at[:, None] + lane[None, :]
        tl.store(to, found, mask=alive[:, None] & (lane < BATCH)[None, :])
        at -= BATCH


def plan(
    grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor, write_slots: Tensor, write_weights: Tensor,
    read_slots: Tensor, read_weights: Tensor, values: Tensor, memory: Tensor, mass: Tensor, decay_power: float,
    eps: float, proxy_eps: float, schedule: SlotsScan,
) -> Plan:  # fmt: skip
    """Plan the gradients of write_weights and read_weights [N, T, K], values [N, T, D], memory [N, M, D], mass [N, M].

    ``grad_output``, ``grad_memory`` and ``grad_mass`` are the gradients of the forward's outputs. The derivative of the
    decay is the proxy's (paper, step 7).
    """
    heads, tokens, top_k = write_slots.shape
    num_slots, dim = memory.shape[1:]
    group = min(heads, schedule.heads or heads)
    acc = sum_type(values, write_weights, memory)
    outputs = [x.new_empty(x.shape) for x in (write_weights, read_weights, values, memory, mass)]
    launches = [copy(grad_memory, outputs[3]), copy(grad_mass, outputs[4])]
    scratch: _Scratch | None = None
    for first in range(0, heads, group):
        some = slice(first, first + group)
        inputs = [x[some] for x in (write_slots, write_weights, read_slots, read_weights, values, memory, mass)]
        given = [x[some] for x in (grad_output, grad_memory, grad_mass)]
        walk = Pieces(
            len(inputs[0]), tokens, top_k, num_slots, dim, acc, schedule.piece, schedule.threads, schedule.channels
        )
        scratch = scratch or _Scratch(walk, write_slots)
        launches += prepare_pieces(walk, scratch, inputs, decay_power, eps, proxy_eps=proxy_eps)
        launches += _way_back(walk, scratch, inputs[4:], given, [x[some] for x in outputs])
    return Plan(tuple(launches), tuple(outputs))


class _Scratch(Scratch):
    """Adds products, for N heads padded to whole pieces, and kept_rows with D channels, for each of their batches."""

    def __init__(self, walk: Pieces, slots: Tensor) -> None:
        super().__init__(walk, slots, backward=True)
        self.products = slots.new_empty(walk.positions, dtype=walk.acc)
        self.kept_rows = slots.new_empty(walk.positions // BATCH, walk.dim, dtype=walk.acc)


def _way_back(
    walk: Pieces, scratch: _Scratch, inputs: Sequence[Tensor], given: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Launch]:
    """Return the launches that compute the gradients of a group's heads, given the row before each piece, values, the
    state, and the three gradients of the outputs."""
    values, memory, _ = inputs
    grad_output, _, _ = given
    _, grad_read, grad_values, _, _ = outputs
    names = ("values", "memory", "mass", "grad_output", "grad_memory", "grad_mass",
             "grad_write", "grad_read", "grad_values", "new_grad_memory", "new_grad_mass")  # fmt: skip
    tensors = {**vars(scratch), **dict(zip(names, (*inputs, *given, *outputs), strict=True))}
    constants = {**walk.constants(), "BLOCK": MASS_THREADS}

    def launch(kernel: Any, programs: int, threads: int, work: Work) -> Launch:
        known = {**tensors, **constants}
        return TritonLaunch(kernel, (programs,), {name: known[name] for name in kernel.arg_names}, threads, work)

    tokens = sum(x.numel() * x.element_size() for x in (values, grad_output))
    gathered = walk.row_traffic(values) + walk.row_traffic(grad_output)
    state, size = walk.state_traffic(memory), walk.acc_size
    kept = walk.positions // BATCH * walk.dim * size
    reads = (12 + 3 * size) * walk.positions + kept + 2 * state + 2 * walk.row_bytes
    writes = (12 + 4 * size) * walk.positions + kept + 3 * state + walk.row_bytes + walk.part_bytes
    weights = grad_read.numel() * grad_read.element_size()
    # A scattered gradient of a weight costs a whole sector of 32 bytes.
    sectors = 32 * grad_read.numel()
    mass_back, mass_there = (12 + 3 * size) * walk.positions, (12 + 5 * size) * walk.positions
    blocks = triton.cdiv(walk.heads * walk.pieces, MASS_THREADS)
    steps = walk.piece / BATCH

    def rows_work(moved: float) -> Work:
        return Work(walk.programs, walk.threads, moved + tokens, moved + gathered, steps, trips=2)

    def mass_work(moved: float) -> Work:
        return Work(blocks, MASS_THREADS, moved + weights, moved + sectors, steps, trips=1)

    return [
        launch(slot_reads, walk.programs, walk.threads, rows_work(reads)),
        launch(mass_reads, blocks, MASS_THREADS, mass_work(mass_there)),
        carries(walk, scratch, reverse=True),
        launch(slot_writes, walk.programs, walk.threads, rows_work(writes)),
        launch(mass_writes, blocks, MASS_THREADS, mass_work(mass_back)),
        sum_parts(walk, scratch.parts, grad_values),
    ]
