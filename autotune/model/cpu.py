"""A model of the time of a schedule's kernel on a CPU.

It counts, from the loops of the kernels in ``lowering/cpu``, instructions, bytes through the ports of L1, cache lines
from L2, and cache lines from beyond L2. A core's time follows the execution-cache-memory model (Hager, Treibig, Habich
and Wellein 2016): transfers between different levels do not overlap, and computation overlaps with them. The overlap
is not perfect, which the 2-norm of the two times approximates::

    ‖ instructions / width, L1 ports + lines from L2 + lines from beyond ‖₂

T tasks on p threads take ⌈T / p⌉ / T of the total work, plus waking the threads. The rates of L2 and memory are
measured (``autotune.measure.bandwidth``); the others are given below. The model ranks schedules; its seconds are rough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from autotune.measure.bandwidth import bandwidth, cache_sizes
from lowering.targets import cpu_name
from schedules import cpu
from schedules.cpu.lanes import REGISTER_BYTES
from schedules.workload import Workload

# Cycles a second: assumed.
CLOCK = 3e9
# Instructions a cycle: what x86 and ARM cores of these years take in is 4 to 8, of which 4 are assumed to be kept.
WIDTH = 4.0
# Of instructions on vectors of 64 bytes a cycle takes two, where it takes three or four on narrower ones (Zen 4's are
# split in halves, Intel's have fewer ports: vendors' optimisation guides).
WIDEST, COST_OF_WIDEST = 64, 1.5
# Bytes a cycle through L1's ports: two loads of 32 and a store of 32 (the same guides, cores with AVX2).
LOADED, STORED = 64.0, 32.0
# Bytes of L1 for data, which the system does not tell everywhere, and of a line.
L1, LINE = 32 << 10, 64
# Of the rate at which memory is read, what is left where it is also written. The one constant that was chosen by a look
# at measurements: on an EPYC the backward scan's rank correlation is 0.8 with it, 0.6 with 1.
MIXED = 0.5
# Of a loop's turn: compare, jump, count.
TURN = 2.0
# Seconds to wake the other threads and wait for the last: assumed.
WAKE = 5e-6
# Of e^x by its polynomial, and of a comparison that moves a score and its label, two each way.
EXPONENTIAL, EXCHANGE = 16, 6
# A buffer that is no register is loaded and stored at each use.
LOOPED = 2.0


@dataclass(frozen=True)
class Machine:
    """A CPU: bytes of a vector and of a core's L2, bytes/s that a core reads from L2 and from memory, and threads."""

    vector: int
    l2: int
    from_l2: float
    from_far: float
    threads: int


@cache
def this_machine(threads: int) -> Machine:
    """Describe this CPU, and measure the bandwidth of its caches and memory."""
    features = cpu_name().rpartition(" ")[2]
    vector = 64 if features.startswith("avx512") else 32 if features.startswith(("avx", "sve")) else 16
    far = bandwidth("DRAM", threads) / threads  # what is left of it for each
    return Machine(vector, cache_sizes()[2], bandwidth("L2"), far, threads)


@dataclass
class Counts:
    """The total work of all threads, to which each op below adds."""

    machine: Machine
    size: int  # bytes of a value
    operations: float = 0.0
    loaded: float = 0.0
    stored: float = 0.0
    from_l2: float = 0.0
    from_far: float = 0.0
    tasks: float = 1.0  # that may run on different threads
    parallel: bool = True

    def vectors(self, width: int) -> float:
        """Return the vectors for ``width`` values, with the widest ones weighted by their cost."""
        wide = self.machine.vector == WIDEST and 2 * width * self.size > WIDEST
        return math.ceil(width * self.size / self.machine.vector) * (COST_OF_WIDEST if wide else 1.0)

    def rows(self, accesses: float, distinct: float, width: int, held: float) -> None:
        """Add random reads of ``distinct`` rows of ``width`` values in a working set of ``held`` bytes.

        The first access of each misses L1; of the others, the share by which the working set exceeds L1.
        """
        first = min(accesses, distinct)
        line = max(width * self.size, LINE)
        misses = first + (accesses - first) * max(0.0, 1 - L1 / held)
        if held <= self.machine.l2:
            self.from_l2 += misses * line
        else:
            beyond = 1 - self.machine.l2 / held
            self.from_far += misses * line * beyond
            self.from_l2 += misses * line * (1 - beyond)

    def stream(self, size: float, times: float, also: float) -> None:
        """Add writing ``size`` bytes, while ``also`` other bytes are in use, and reading them, ``times`` times.

        A line is fetched before it is written, and written back. Reading starts at the end, which L2 still holds.
        """
        beyond = max(0.0, 1 - self.machine.l2 / (size + also))
        self.from_far += 3 * size * times * beyond / MIXED
        self.from_l2 += 3 * size * times * (1 - beyond)

    @property
    def terms(self) -> dict[str, float]:
        """Return the seconds of each term if one core did all the work."""
        return {
            "instructions": self.operations / WIDTH / CLOCK,
            "L1": (self.loaded / LOADED + self.stored / STORED) / CLOCK,
            "L2": self.from_l2 / self.machine.from_l2,
            "far": self.from_far / self.machine.from_far,
        }

    @property
    def seconds(self) -> float:
        terms = self.terms
        core = math.hypot(terms["instructions"], terms["L1"] + terms["L2"] + terms["far"])
        threads = self.machine.threads if self.parallel else 1
        share = math.ceil(self.tasks / threads) / self.tasks
        return core * share + (WAKE if self.parallel and threads > 1 else 0.0)


def seconds(workload: Workload, schedule: Any, machine: Machine) -> float:
    """Return the modelled seconds of a call of ``workload`` under ``schedule``."""
    return counts(workload, schedule, machine).seconds


def counts(workload: Workload, schedule: Any, machine: Machine) -> Counts:
    """Count the kernel's work."""
    found = Counts(machine, 8 if workload.dtype == "float64" else 4)
    ops: dict[type, Any] = {
        cpu.MemoryScan: _scan,
        cpu.MemoryScanBackward: _scan_backward,
        cpu.MemoryStep: _step,
        cpu.AddressDecode: _decode,
        cpu.AddressDecodeBackward: _decode_backward,
    }
    ops[type(schedule)](found, workload.shape, schedule)
    return found


def _turns(top_k: int, unroll: int) -> float:
    """Return the loop overhead over slots that are not unrolled."""
    return TURN * (top_k // unroll) if top_k >= 2 * unroll else 0.0


def _token(found: Counts, shape: dict[str, int], tile: int, unroll: int, times: float) -> None:
    """Add a token on a tile of channels, K rows written and K rows read and summed, ``times`` times."""
    K, v, size = shape["K"], found.vectors(tile), found.size
    partial_sums = K // unroll if 2 * unroll <= K else 1
    write = K * (5 + 4 * v)  # slot, address, decay, weight; load, product, multiply-add, store
    read = K * (4 + 2 * v) + v + (partial_sums - 1) * 2 * v
    found.operations += times * (write + read + 2 * _turns(K, unroll) + TURN)
    found.loaded += times * (2 * K + 1 + partial_sums - 1) * tile * size
    found.stored += times * (K + partial_sums) * tile * size


def _scan(found: Counts, shape: dict[str, int], schedule: cpu.MemoryScan) -> None:
    N, T, K, M, D = (shape[axis] for axis in "NTKMD")
    width, size = D // schedule.groups, found.size
    found.tasks = N * schedule.groups
    chunks, tiles = math.ceil(T / schedule.chunk), width // schedule.tile
    tokens = min(schedule.chunk, T)
    # The mass and the factors, by scalars but for the divisions.
    found.operations += found.tasks * T * (12 * K + 2 * _turns(K, schedule.unroll) + 3 * TURN)
    _token(found, shape, schedule.tile, schedule.unroll, found.tasks * T * tiles)
    accesses = 2 * K * tokens
    distinct = M * (1 - (1 - 1 / M) ** accesses)
    held = distinct * max(schedule.tile * size, LINE) + 6 * K * tokens * size
    passes = found.tasks * chunks * tiles
    found.rows(passes * accesses, passes * distinct, schedule.tile, held)
    # Slots, weights, decays and factors of a chunk, for every tile anew; operands and results once.
    found.from_l2 += found.tasks * tiles * T * 5 * K * size
    found.from_far += size * (N * T * (4 * K * schedule.groups + 2 * D) + 2 * N * M * D)
    found.operations += found.tasks * M * 3 * found.vectors(width)


def _scan_backward(found: Counts, shape: dict[str, int], schedule: cpu.MemoryScanBackward) -> None:
    N, T, K, M, D = (shape[axis] for axis in "NTKMD")
    tile, size, v = schedule.tile, found.size, found.vectors(schedule.tile)
    tiles, turns = D // tile, _turns(K, schedule.unroll)
    found.tasks = N
    folds = 3 * sum(found.vectors(tile >> i) for i in range(1, tile.bit_length()))
    forward = K * (5 + 5 * v) + turns
    read = K * (8 + 6 * v + folds) + turns
    values = K * (3 + 2 * v) + v + turns
    write = K * (9 + 9 * v + folds) + turns
    found.operations += N * T * (30 * K + 4 * turns) + N * T * tiles * (forward + read + values + write)
    found.loaded += N * T * D * size * 11 * K
    found.stored += N * T * D * size * 7 * K
    rows = M * max(tile * size, LINE)
    found.rows(N * tiles * T * K * 6, N * tiles * M * 2, tile, 2 * rows)
    found.stream(T * K * tile * size, N * tiles, 2 * rows)
    found.from_l2 += N * tiles * T * 8 * K * size
    found.from_far += N * size * (T * (8 * K + 3 * D) + 4 * M * D)


def _step(found: Counts, shape: dict[str, int], schedule: cpu.MemoryStep) -> None:
    N, K, D = (shape[axis] for axis in "NKD")
    found.tasks, found.parallel = N, schedule.parallel
    found.operations += N * (22 * K + 2 * _turns(K, schedule.unroll) + 20)
    if schedule.prefetch:
        found.operations += N * 2 * K * (6 + math.ceil(D * found.size / LINE))
    _token(found, shape, schedule.tile, schedule.unroll, N * D // schedule.tile)
    touched = 2.0 * N * K
    found.rows(touched, touched, D, touched * D * found.size)


def _decode(found: Counts, shape: dict[str, int], schedule: cpu.AddressDecode) -> None:
    R, U, P, K = (shape[axis] for axis in "RUPK")
    v, straight = found.vectors(schedule.lanes), schedule.unroll > 0
    width, ranks = 1 << (K - 1).bit_length(), min(P, K)
    found.parallel = schedule.parallel
    found.tasks = blocks = max(1, R // schedule.lanes)
    # In loops scores and labels are rows of one buffer, which is on the stack where it is small.
    slow = LOOPED * _outside(found, width, schedule.lanes)
    exchange = EXCHANGE if straight else EXCHANGE * slow + TURN
    move = 2 if straight else 2 * slow + TURN

    def level(prefixes: int) -> float:
        sort = P * ranks * exchange + P * (EXPONENTIAL + 3) + 2 * width * move
        joins = 0.0
        for j in range(1, ranks):
            kept = min(K // (j + 1), prefixes) if straight else K // (j + 1)
            joins += kept * (move + 4) + width // 2 * (width.bit_length() - 1) * exchange
        return sort + joins

    levels = (min(width, P**u) if schedule.unroll == 2 else width for u in range(U))
    statements = sum(level(prefixes) for prefixes in levels) + K * (EXPONENTIAL + 4)
    # Logits are gathered, slots and weights scattered, a lane at a time.
    found.operations += blocks * (v * statements + schedule.lanes * 2 * (U * P + 2 * K))
    found.from_far += R * found.size * (U * P + 2 * K)


def _decode_backward(found: Counts, shape: dict[str, int], schedule: cpu.AddressDecodeBackward) -> None:
    R, U, P, K = (shape[axis] for axis in "RUPK")
    v = found.vectors(schedule.lanes)
    found.parallel = schedule.parallel
    found.tasks = blocks = max(1, R // schedule.lanes)
    slow = _outside(found, K, schedule.lanes)
    statements = slow * (4 * K + U * (P * (EXPONENTIAL + 12) + K * (P * 4 + 10)))
    found.operations += blocks * (v * statements + schedule.lanes * 2 * (3 * K + 3 * U * P))
    found.from_far += R * found.size * (2 * U * P + 3 * K)


def _outside(found: Counts, rows: int, lanes: int) -> float:
    """Return the slowdown of statements on a buffer of ``rows`` by ``lanes`` if it is not on the stack."""
    return LOOPED if rows * lanes * found.size >= REGISTER_BYTES else 1.0
