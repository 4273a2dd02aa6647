"""What binaries need, as ptxas prints it."""

from __future__ import annotations

import re

from lowering.gpu.resources import Resources


def resources(printed: str, shared: dict[str, int]) -> dict[str, Resources]:
    """By function, what ``ptxas -v`` printed of each kernel, with its dynamic shared memory."""
    found = {}
    for part in printed.split("Compiling entry function '")[1:]:
        name = part.split("'")[0].removesuffix("_kernel")

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found[name] = Resources(
            registers=number(r"Used (\d+) registers"), spilled=spilled_bytes(part),
            local=number(r"(\d+) bytes stack frame"), shared=shared[name] + number(r"(\d+) bytes smem"),
        )  # fmt: skip
    return found


def spilled_bytes(printed: str) -> int:
    """Bytes that the instructions which ``ptxas -v`` calls spills store or load, whichever are more; of all functions.

    The frame that ``cuobjdump`` calls STACK holds spilled registers and arrays that the program itself indexes.
    """
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    return sum(max(int(stores), int(loads)) for stores, loads in found)
