"""Parses the resource usage that ptxas prints."""

from __future__ import annotations

import re

from lowering.gpu.resources import Resources


def resources(printed: str, shared: dict[str, int]) -> dict[str, Resources]:
    """Parse the output of ``ptxas -v`` by function; ``shared`` is the dynamic shared memory to add, in bytes."""
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
    """Return the larger of the bytes of spill stores and spill loads that ``ptxas -v`` printed, summed over functions.

    The size that ``cuobjdump`` calls STACK does not serve: it also includes the program's indexed local arrays.
    """
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    return sum(max(int(stores), int(loads)) for stores, loads in found)
