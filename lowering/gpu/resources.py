"""What a launch of a GPU kernel does, and what its binary needs: all that the time model knows of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Counted from the sizes, where the launch is planned.

    Attributes:
        programs: thread blocks in all. threads: of each.
        dram_bytes: each input read once and each output written once.
        cache_bytes: through the L2 cache, with every repeated access, the above included.
        shared_bytes: through shared memory.
        operations: arithmetic instructions of single lanes, in all.
        steps: dependent steps that a program walks, one after another.
        trips: round trips to global memory in a step that wait for one another.
        shared_trips: the same to shared memory. barriers: of the whole program, in a step.
        reused_bytes: what the repeated accesses fall on, of all programs together; 0 where any cache holds it.
    """

    programs: int
    threads: int
    dram_bytes: float
    cache_bytes: float
    operations: float
    steps: float = 1.0
    trips: float = 1.0
    shared_trips: float = 0.0
    barriers: float = 0.0
    shared_bytes: float = 0.0
    reused_bytes: float = 0.0


@dataclass(frozen=True)
class Resources:
    """Read from the compiled binary.

    Attributes:
        registers: of a thread. spilled: bytes of a thread's registers that went to memory.
        local: bytes of a thread's stack, spills included. shared: bytes of a program.
    """

    registers: int
    spilled: int
    local: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """One launch of a candidate, compiled for a target."""

    name: str
    work: Work
    resources: Resources
