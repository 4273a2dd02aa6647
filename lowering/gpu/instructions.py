"""Counts the instructions that a thread issues, from the machine code of a compiled kernel.

The hot loop is the innermost loop with the most instructions. It and the loops around it run as often as the plan says,
and all other code counts once.

Every instruction counts as one. Of alternatives, each counts, as if the lanes of a warp diverged. Loops that are not
around the hot one count as if they ran once, and so do loops that are nested more deeply than the plan says. Of nested
loops, the inner ones are assumed to be those that a compiler unrolls. Subroutines, which nvcc calls for rare operands
of divisions, do not count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

from lowering.gpu.triton_compiler import tool

_LABEL = re.compile(r"([.$\w]\S*):")
# NVIDIA: an address, a predicate, a name with modifiers, operands, and the label that a branch goes to.
_NVIDIA = re.compile(
    r"\s+/\*\w+\*/\s+(?P<condition>@\S+\s+)?(?P<name>\w+)\S*\s*(?P<operands>[^`;]*)(?:`\((?P<label>\.\w+)\))?"
)
_AMD = re.compile(r"\t(?P<name>[a-z]\w+)\s*(?P<label>\.LBB\w+)?")
_BRANCH = re.compile(r"BRA|CALL|s_c?branch")
_ENDS = ("EXIT", "s_endpgm")
_ACCESS = re.compile(r"LD|ST|RED|ATOM|global_|ds_|buffer_|flat_|scratch_")


class Instruction(NamedTuple):
    """An instruction without its operands.

    Attributes:
        target: the index of the instruction that it may branch to.
        goes_on: whether the next instruction may follow it.
    """

    name: str
    target: int | None = None
    goes_on: bool = True


@lru_cache(maxsize=256)
def of_cubin(cubin: bytes) -> dict[str, list[Instruction]]:
    """Disassemble each kernel of a cubin. Schedules share many kernels, and nvdisasm takes 0.3 s each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool("nvdisasm"), "-c", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return of_nvidia(printed)


def of_nvidia(printed: str) -> dict[str, list[Instruction]]:
    """Parse the output of ``nvdisasm -c`` by kernel."""
    sections = re.split(r"^//-+ \.text\.", printed, flags=re.MULTILINE)[1:]
    return {section.split()[0]: _parse(section, _NVIDIA) for section in sections}


def of_amd(amdgcn: str) -> list[Instruction]:
    """Parse AMD assembly code, which has one kernel."""
    return _parse(amdgcn.partition(".Lfunc_end0:")[0], _AMD)


def issued(code: Sequence[Instruction], iterations: Sequence[float]) -> float:
    """Return the instructions that a thread issues.

    Args:
        code: the kernel.
        iterations: how often each loop around the hot one runs, from the outermost, and the hot one. Where compilers
            have unrolled the inner ones, there are fewer loops in the code.
    """
    loops = _loops(code)
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    hot = max(innermost, key=lambda loop: _count(code, loop), default=frozenset[int]())
    around = sorted((loop for loop in loops if hot <= loop), key=len, reverse=True)
    runs = [number for number in iterations if number != 1]  # a loop of one iteration is not in the code
    if 0 < len(around) <= len(runs):
        runs[len(around) - 1] /= _unrolled(code, hot, innermost)
    nest = around[0] if around else hot
    total = _count(code, _reached(_successors(code), 0) - nest)
    return total + sum(prod(runs[: sum(i in loop for loop in loops)]) * _is_issued(code[i]) for i in nest)


def _unrolled(code: Sequence[Instruction], hot: frozenset[int], innermost: Iterable[frozenset[int]]) -> int:
    """Return how many iterations a compiler has put into one of ``hot``.

    A loop that is unrolled is followed by a loop for the remaining iterations, which has a fraction of its loads and
    stores of each kind.
    """
    whole = _accesses(code, hot)
    for rest in (_accesses(code, loop) for loop in innermost if min(loop) > max(hot)):
        factor = whole.total() // max(rest.total(), 1)
        if factor > 1 and whole == Counter({name: factor * number for name, number in rest.items()}):
            return factor
    return 1


def _accesses(code: Sequence[Instruction], loop: Iterable[int]) -> Counter[str]:
    return Counter(code[i].name for i in loop if _ACCESS.match(code[i].name))


def _count(code: Sequence[Instruction], some: Iterable[int]) -> int:
    return sum(_is_issued(code[i]) for i in some)


def _is_issued(instruction: Instruction) -> bool:
    """Return whether an instruction takes a turn of the vector units: AMD's scalar unit issues its own beside them."""
    return not instruction.name.startswith("s_")


def _loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """Return the loops, each as its instructions: those that lead back to an instruction that dominates them."""
    after = _successors(code)
    before: list[list[int]] = [[] for _ in code]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    found, reached = [], _reached(after, 0)
    for first, leading in enumerate(before):
        if len(leading) > 1 or first == 0:
            # What cannot be reached without the first instruction is dominated by it.
            dominated = reached - _reached(after, 0, without=first)
            back = [i for i in leading if i in dominated]
            if back:
                found.append(frozenset({first}).union(*(_reached(before, i, without=first) for i in back)))
    return found


def _successors(code: Sequence[Instruction]) -> list[list[int]]:
    following = [[i + 1] if each.goes_on and i + 1 < len(code) else [] for i, each in enumerate(code)]
    for each, found in zip(code, following, strict=True):
        found += [] if each.target is None else [each.target]
    return following


def _reached(graph: Sequence[Sequence[int]], start: int, without: int | None = None) -> frozenset[int]:
    """Return the nodes that can be reached from ``start`` on paths that avoid ``without``."""
    found: set[int] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node not in found and node != without:
            found.add(node)
            waiting += graph[node]
    return frozenset(found)


def _parse(text: str, pattern: re.Pattern[str]) -> list[Instruction]:
    labels: dict[str, int] = {}
    found: list[tuple[str, str, bool]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := pattern.match(line):
            given = instruction.groupdict("")
            name = given["name"]
            target = given["label"] if _BRANCH.match(name) else ""
            conditional = given.get("condition") or given.get("operands") or "cbranch" in name
            found.append((name, target, bool(conditional) or not (target or name in _ENDS)))
    return [Instruction(name, labels.get(target), goes_on) for name, target, goes_on in found]
