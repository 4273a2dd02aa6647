"""A model of the time of compiled launches on a GPU that this machine need not have.

A launch of G programs is described by its ``Work``, counted from the sizes, and by its binary: its ``Resources``, and
the instructions that a thread issues, counted in the machine code (``lowering.gpu.instructions``). R programs are
resident on a processor at a time (``resident``), so P processors run them in ⌈G / (P R)⌉ waves. Its time is::

    launch + ‖ memory, cache, shared, arithmetic, chain ‖₂

    memory      bytes of DRAM / what a copy reaches
    cache       bytes through L2, spills included / (busy processors × bytes a cycle)
    shared      bytes through shared memory / (busy processors × bytes a cycle)
    arithmetic  instructions of all lanes, idle or not / (busy processors × lanes), on the processor that has the most
                programs
    chain       waves × (steps × (waits for memory, for shared memory and at barriers) + a thread's instructions)

The terms overlap in part: two equal terms give 1.41 times one. An op's time is the sum over its launches, which run one
after another.

The constants are in cycles, or bytes per cycle, so that they apply to other clocks. ``ISSUE_CYCLES``,
``SHARED_LATENCY``, ``L2_BYTES_A_CYCLE`` and ``NORM`` were fitted, and ``LANES`` confirmed, by least squares of the
logarithms of 79 launches on an H100: the shared scans forward and backward, and the address kernels. The modelled times
are off by 14 % (root mean square); before the fit, by 22 %. The others are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowering.gpu.resources import Compiled, Resources, Work
from lowering.targets import Gpu

# Latencies in cycles of an L2 hit, a DRAM access and shared memory. The first two are assumed, in the round numbers
# that microbenchmarks of NVIDIA's GPUs since the A100 tell; the third is fitted, with what loads wait in the queue of
# the shared memory. AMD's are assumed to be as long.
L2_LATENCY, DRAM_LATENCY, SHARED_LATENCY = 265.0, 500.0, 40.0
# Cycles that a barrier of one program costs its warps beyond their own work: assumed, as long as shared memory.
BARRIER_LATENCY = 30.0
# Cycles from one instruction of a warp to the next that can be issued: fitted. A dependent one takes 4 (PMC10448217,
# table 3).
ISSUE_CYCLES = 1.3
# Of a processor. L2: fitted; the data sheets' peak is 47 (5120 over the A100's 108), and rows lie at random places.
# Shared memory: 32 banks of 4 bytes (CUDA programming guide).
L2_BYTES_A_CYCLE, SHARED_BYTES_A_CYCLE = 18.0, 128.0
# Of the data sheet's bandwidth: a copy on an H200 reached 4300 of 4800 GB/s.
DRAM_SHARE = 0.9
# Lanes of a processor that execute an instruction in a cycle. On NVIDIA's since the A100, 64 for comparisons and
# integers (CUDA programming guide, throughput of arithmetic instructions), which are most of what these kernels issue;
# on AMD's, 16 in each of four vector units (CDNA3 ISA guide).
LANES = 64
# Seconds from one launch to the next on a stream: assumed, within the 2 to 5 µs that are commonly seen.
LAUNCH = 3e-6
NORM = 2

# How a processor shares out what it has (CUDA occupancy calculator, compute capability 8.0 to 10.0; AMD's CDNA3 ISA
# guide): registers of a thread in eights, over four schedulers; NVIDIA's system takes 1 KB of shared memory a program.
REGISTER_GRANULE, SCHEDULERS, SHARED_GRANULE, SYSTEM_SHARED = 8, 4, 128, 1024


class RejectedError(ValueError):
    """A binary that cannot be used on the target: ``status`` is one word, the message one sentence."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Estimate:
    """The modelled terms of one launch in seconds, and the ``resident`` programs per processor."""

    name: str
    resident: int
    occupancy: float  # resident threads divided by the most that a processor can hold
    waves: int
    launch: float
    memory: float
    cache: float
    shared: float
    arithmetic: float
    chain: float

    @property
    def terms(self) -> dict[str, float]:
        """The seconds of the overlapping terms."""
        names = ("memory", "cache", "shared", "arithmetic", "chain")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        return self.launch + sum(term**NORM for term in self.terms.values()) ** (1 / NORM)

    @property
    def binds(self) -> str:
        """The longest term, which may be "launch"."""
        terms = {**self.terms, "launch": self.launch}
        return max(terms, key=lambda name: terms[name])


def check(compiled: Compiled, gpu: Gpu) -> None:
    """Raise RejectedError if the binary spills registers or cannot run on ``gpu``."""
    needs, threads, name = compiled.resources, compiled.work.threads, compiled.name
    if threads < gpu.warp or threads > 1024:
        raise RejectedError("threads", f"{name} has programs of {threads} threads; {gpu.arch} takes {gpu.warp} to 1024")
    if needs.shared > gpu.shared_block:
        raise RejectedError(
            "shared_memory", f"{name} needs {needs.shared} bytes of shared memory; {gpu.arch} has {gpu.shared_block}"
        )
    if needs.spilled:
        raise RejectedError("spills", f"{name} spills {needs.spilled} bytes of a thread's {needs.registers} registers")
    if not resident(threads, needs, gpu):
        raise RejectedError(
            "registers", f"{name} needs {needs.registers} registers for {threads} threads; {gpu.arch} has fewer"
        )


def resident(threads: int, needs: Resources, gpu: Gpu) -> int:
    """Return the programs that are resident on a processor at a time; 0 if none fits."""
    warps = math.ceil(threads / gpu.warp)
    register_lanes = _round_up(max(needs.registers, 1), REGISTER_GRANULE) * gpu.warp
    # A warp's registers lie with one scheduler.
    warps_by_registers = gpu.registers // SCHEDULERS // register_lanes * SCHEDULERS
    system = SYSTEM_SHARED if gpu.backend == "cuda" else 0
    shared = _round_up(needs.shared, SHARED_GRANULE) + system
    return min(
        gpu.programs,
        gpu.threads // (warps * gpu.warp),
        warps_by_registers // warps,
        gpu.shared // shared if shared else gpu.programs,
    )


def estimate(compiled: Compiled, gpu: Gpu) -> Estimate:
    """Return the model's terms for one launch. Raises RejectedError if no program fits on a processor."""
    work, needs = compiled.work, compiled.resources
    fits = resident(work.threads, needs, gpu)
    if not fits:
        check(compiled, gpu)
        raise RejectedError("threads", f"{compiled.name}: no program of {work.threads} threads fits on {gpu.arch}")
    programs = max(work.programs, 1)
    waves = math.ceil(programs / (gpu.processors * fits))
    busy = min(programs, gpu.processors)
    # Of the processor that has the most programs: what it does, over what all do.
    share = math.ceil(programs / gpu.processors) / programs
    # Each spilled byte goes out and comes back in every step.
    spills = 2.0 * needs.spilled * work.threads * programs * work.steps
    missed = _missed(work, gpu)
    through_cache = work.cache_bytes + spills
    from_memory = work.dram_bytes + missed * max(through_cache - work.dram_bytes, 0.0)
    instructions = (work.busy_threads or work.threads) * programs * compiled.instructions
    return Estimate(
        name=compiled.name,
        resident=fits,
        occupancy=fits * work.threads / gpu.threads,
        waves=waves,
        launch=LAUNCH,
        memory=from_memory / (gpu.bandwidth * DRAM_SHARE),
        cache=through_cache / (busy * L2_BYTES_A_CYCLE * gpu.clock),
        shared=work.shared_bytes / (busy * SHARED_BYTES_A_CYCLE * gpu.clock),
        arithmetic=share * instructions / (LANES * gpu.clock),
        chain=waves * (work.steps * _waits(work, missed) + compiled.instructions * ISSUE_CYCLES) / gpu.clock,
    )


def explain(compiled: Sequence[Compiled], gpu: Gpu) -> list[Estimate]:
    """Return the estimate of each launch."""
    return [estimate(launch, gpu) for launch in compiled]


def seconds(compiled: Sequence[Compiled], gpu: Gpu) -> float:
    """Return the modelled seconds of launches that run one after another."""
    return sum(launch.seconds for launch in explain(compiled, gpu))


def _missed(work: Work, gpu: Gpu) -> float:
    """Return the share of repeated accesses that miss L2, if their data is larger than L2."""
    return max(0.0, 1.0 - gpu.l2 / work.reused_bytes) if work.reused_bytes else 0.0


def _waits(work: Work, missed: float) -> float:
    """Return the cycles for which a step waits, in a program alone on a processor; data that is read once is
    prefetched."""
    latency = L2_LATENCY + missed * (DRAM_LATENCY - L2_LATENCY)
    return work.trips * latency + work.shared_trips * SHARED_LATENCY + work.barriers * BARRIER_LATENCY


def _round_up(number: int, granule: int) -> int:
    return -(-number // granule) * granule
