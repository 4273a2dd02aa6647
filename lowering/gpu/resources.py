"""The work of a GPU launch and the resources of its binary, which are the inputs of the time model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The work of a launch, counted from the sizes when the launch is planned.

    Attributes:
        programs: the number of thread blocks.
        threads: threads per block.
        dram_bytes: bytes of all inputs and outputs, each counted once.
        cache_bytes: bytes through the L2 cache, including repeated accesses and dram_bytes.
        shared_bytes: bytes through shared memory.
        steps: sequential steps of a program.
        trips: dependent round trips to global memory per step.
        shared_trips: dependent round trips to shared memory per step.
        barriers: barriers of the whole program per step.
        reused_bytes: bytes of the data that is accessed repeatedly, over all programs; 0 if it fits in any cache.
        iterations: how often each loop around the hot one runs, from the outermost, and the hot one itself; empty if
            there is one loop, of ``steps``.
        busy_threads: threads of the warps that run most of the code; 0 if all do.
    """

    programs: int
    threads: int
    dram_bytes: float
    cache_bytes: float
    steps: float = 1.0
    trips: float = 1.0
    shared_trips: float = 0.0
    barriers: float = 0.0
    shared_bytes: float = 0.0
    reused_bytes: float = 0.0
    iterations: tuple[float, ...] = ()
    busy_threads: int = 0

    @property
    def nest(self) -> tuple[float, ...]:
        """``iterations``, also if they follow from ``steps``."""
        return self.iterations or (self.steps,)


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled binary.

    Attributes:
        registers: registers per thread.
        spilled: bytes of spilled registers per thread.
        local: bytes of stack per thread, including spills.
        shared: bytes of shared memory per program.
    """

    registers: int
    spilled: int
    local: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """One launch of a candidate, compiled for a target; a thread issues ``instructions``, counted in the binary."""

    name: str
    work: Work
    resources: Resources
    instructions: float
