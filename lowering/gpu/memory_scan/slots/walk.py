"""How sorted accesses are cut into pieces, and the first and last launches of both scans over slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lowering.gpu.memory_scan.slots.masses import mass_pieces, mass_scan
from lowering.gpu.memory_scan.slots.order import OrderScratch, order
from lowering.gpu.memory_scan.slots.pieces import piece_carries, piece_sums, piece_terms, sum_accesses
from lowering.gpu.plan import Launch
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.types import in_triton
from schedules.gpu.slots import BATCH

_TERMS_BLOCK = 256
_TERMS_THREADS = 128
_CARRY_BATCH = 16
_CARRY_THREADS = 64
_SUM_THREADS = 128
MASS_THREADS = 128  # pieces whose mass one program computes, one per thread


@dataclass(frozen=True)
class Pieces:
    """The sizes of a group of heads, and how its pieces are distributed over programs.

    Attributes:
        heads, tokens, top_k, num_slots, dim: N, T, K, M, D.
        acc: the dtype of sums.
        piece: accesses per piece.
        threads: threads per program.
        channels: channels of a row per thread.
    """

    heads: int
    tokens: int
    top_k: int
    num_slots: int
    dim: int
    acc: torch.dtype
    piece: int
    threads: int
    channels: int

    @property
    def accesses(self) -> int:
        """The number of accesses of a head."""
        return 2 * self.tokens * self.top_k

    @property
    def pieces(self) -> int:
        """The number of pieces of a head."""
        return triton.cdiv(self.accesses, self.piece)

    @property
    def padded(self) -> int:
        """The number of accesses of a head, padded to whole pieces."""
        return self.pieces * self.piece

    @property
    def positions(self) -> int:
        return self.heads * self.padded

    @property
    def d_pad(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    @property
    def rows(self) -> int:
        """The number of pieces that a program scans in parallel."""
        return max(1, self.threads * self.channels // self.d_pad)

    @property
    def programs(self) -> int:
        return triton.cdiv(self.heads * self.pieces, self.rows)

    @property
    def acc_size(self) -> int:
        return self.acc.itemsize

    @property
    def row_bytes(self) -> int:
        """The bytes of one row per piece, in the dtype of sums."""
        return self.heads * self.pieces * self.dim * self.acc_size

    @property
    def part_bytes(self) -> int:
        """The bytes of one row per write, or per read, in the dtype of sums."""
        return self.heads * self.tokens * self.top_k * self.dim * self.acc_size

    def constants(self) -> dict[str, Any]:
        """Return the arguments besides tensors of the kernels that scan pieces."""
        return {
            "T": self.tokens, "M": self.num_slots, "pieces": self.pieces, "all_pieces": self.heads * self.pieces,
            "K": self.top_k, "D": self.dim, "D_PAD": self.d_pad, "ROWS": self.rows, "PIECE": self.piece,
            "BATCH": BATCH, "ACC": in_triton(self.acc),
        }  # fmt: skip

    def row_traffic(self, rows: Tensor) -> int:
        """Return the bytes of one row of ``rows`` per write, or per read."""
        return self.heads * self.tokens * self.top_k * self.dim * rows.element_size()

    def state_traffic(self, memory: Tensor) -> int:
        """Return the bytes of the rows of slots before their first access, or after their last."""
        touched = min(self.num_slots, self.accesses)
        return self.heads * touched * self.dim * memory.element_size()


class Scratch:
    """Scratch that the launches of one group of heads share; groups reuse it.

    For each access of N heads, padded to whole pieces, it holds packed, starts, ends (int32), decays, weights and, for
    the ``backward``, slopes and mass_terms. For each of N·pieces pieces: gains, mass_sums, masses, and row_sums and
    rows with D channels. For each of N·T·K reads (in the backward, writes): parts with D channels.
    """

    def __init__(self, walk: Pieces, slots: Tensor, backward: bool) -> None:
        def empty(*shape: int, dtype: torch.dtype = walk.acc) -> Tensor:
            return slots.new_empty(shape, dtype=dtype)

        self.order = OrderScratch.of(slots, walk.heads, walk.num_slots)
        self.packed, self.starts, self.ends = (empty(walk.positions, dtype=torch.int32) for _ in range(3))
        self.decays, self.weights = empty(walk.positions), empty(walk.positions)
        self.slopes, self.mass_terms = (empty(walk.positions if backward else 0) for _ in range(2))
        pieces = walk.heads * walk.pieces
        self.gains, self.mass_sums, self.masses = empty(pieces), empty(pieces), empty(pieces)
        self.row_sums, self.rows = empty(pieces, walk.dim), empty(pieces, walk.dim)
        self.parts = empty(walk.heads * walk.tokens * walk.top_k, walk.dim)

    def named(self, *names: str) -> dict[str, Tensor]:
        """Return tensors by the kernels' names of them."""
        return {name: getattr(self, name) for name in names}


def prepare_pieces(
    walk: Pieces, scratch: Scratch, inputs: Sequence[Tensor], decay_power: float, eps: float,
    new_mass: Tensor | None = None, proxy_eps: float | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches that sort, compute the row before each piece, and replace each read's weight r by r/(z + ε).

    They also store the final mass in ``new_mass`` or, with ``proxy_eps``, slopes and mass_terms. ``inputs`` are
    write_slots, write_weights, read_slots, read_weights, values, memory and mass of the group's heads.
    """
    write_slots, write_weights, read_slots, read_weights, values, memory, mass = inputs
    launches, slots, events = order(write_slots, read_slots, walk.num_slots, scratch.order)
    blocks = walk.heads * triton.cdiv(walk.padded, _TERMS_BLOCK)
    named = scratch.named("packed", "starts", "ends", "decays", "weights", "slopes")
    slope = proxy_eps is not None
    constants = walk.constants() | {"EPS": eps, "BLOCK": MASS_THREADS, "BACKWARD": slope}
    kept = (12 + (3 if slope else 2) * walk.acc_size) * walk.positions
    listed = 8 * walk.heads * walk.accesses
    drawn = 2 * write_weights.numel() * write_weights.element_size()
    launches.append(TritonLaunch(
        piece_terms, (blocks,),
        {"slots": slots, "events": events, "write_weights": write_weights, "read_weights": read_weights, **named,
         "accesses": walk.accesses, "padded": walk.padded, "K": walk.top_k, "POWER": decay_power,
         "PROXY_EPS": proxy_eps or 0.0, "SLOPE": slope, "BLOCK": _TERMS_BLOCK, "ACC": in_triton(walk.acc)},
        _TERMS_THREADS,
        # A gathered weight costs a whole sector of 32 bytes.
        Work(blocks, _TERMS_THREADS, listed + drawn + kept, 2 * listed + 32 * walk.heads * walk.accesses + kept,
             trips=2),
    ))  # fmt: skip
    coefficients = (8 + 2 * walk.acc_size) * walk.positions
    blocks = triton.cdiv(walk.heads * walk.pieces, MASS_THREADS)
    tensors = {**vars(scratch), "mass": mass, "new_mass": mass if new_mass is None else new_mass}

    def on_mass(kernel: Any, moved: float) -> Launch:
        known = {**tensors, **constants}
        work = Work(blocks, MASS_THREADS, moved, moved, steps=walk.piece / BATCH, trips=2)
        return TritonLaunch(kernel, (blocks,), {name: known[name] for name in kernel.arg_names}, MASS_THREADS, work)

    launches.append(on_mass(mass_pieces, coefficients))
    state = walk.state_traffic(memory)
    values_once = values.numel() * values.element_size()
    launches.append(TritonLaunch(
        piece_sums, (walk.programs,),
        {**scratch.named("packed", "starts", "decays", "weights", "row_sums"),
         "values": values, "memory": memory, **walk.constants()},
        walk.threads,
        Work(walk.programs, walk.threads, coefficients + values_once + state + walk.row_bytes,
             coefficients + walk.row_traffic(values) + state + walk.row_bytes,
             steps=walk.piece / BATCH, trips=2),
    ))  # fmt: skip
    launches.append(carries(walk, scratch, reverse=False))
    changed = (4 + (3 if slope else 1) * walk.acc_size) * walk.positions
    launches.append(on_mass(mass_scan, coefficients + changed))
    return launches


def carries(walk: Pieces, scratch: Scratch, reverse: bool) -> Launch:
    """Return the launch that computes the row and mass before each piece, or (``reverse``) their gradients after it."""
    moved = 2 * walk.row_bytes + 3 * walk.heads * walk.pieces * walk.acc_size
    return TritonLaunch(
        piece_carries, (walk.heads,),
        {**scratch.named("gains", "row_sums", "mass_sums", "rows", "masses"), "pieces": walk.pieces,
         "D": walk.dim, "D_PAD": walk.d_pad, "REVERSE": reverse, "BATCH": _CARRY_BATCH, "ACC": in_triton(walk.acc)},
        _CARRY_THREADS,
        Work(walk.heads, _CARRY_THREADS, moved, moved, steps=triton.cdiv(walk.pieces, _CARRY_BATCH)),
    )  # fmt: skip


def sum_parts(walk: Pieces, parts: Tensor, out: Tensor) -> Launch:
    """Return the launch that computes out [N, T, D] = Σ_k parts [N·T·K, D]."""
    tokens = walk.heads * walk.tokens
    rows = max(1, _SUM_THREADS * walk.channels // walk.d_pad)
    moved = walk.part_bytes + out.numel() * out.element_size()
    programs = triton.cdiv(tokens, rows)
    return TritonLaunch(
        sum_accesses, (programs,),
        {"parts": parts, "out": out, "tokens": tokens, "K": walk.top_k, "D": walk.dim, "D_PAD": walk.d_pad,
         "ROWS": rows, "ACC": in_triton(walk.acc)},
        _SUM_THREADS,
        Work(programs, _SUM_THREADS, moved, moved),
    )  # fmt: skip
