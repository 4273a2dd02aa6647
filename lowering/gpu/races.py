"""Checks compiled kernels for data races, which the interpreter cannot reveal.

Memory that a kernel both loads and stores must be of one of two kinds, which is determined from TTGIR, Triton's last
representation that shows layouts and barriers:

- thread-owned (``check_thread_owned``): all accesses have the same layout, which gives no element to two threads. As
  all accesses add a common offset to one tile of addresses, no two threads access the same element.
- exchanged (``check_ordered``): there is a barrier on every path from a store to a load, a load to a store and a store
  to a store, also around loops. A load and the store that follows it may share one tile of addresses, whose elements a
  thread updates, if the layout gives no element to two threads and a token's slots are distinct.

``check_barriers_kept`` checks that the machine code still has the barriers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

_ACCESS = re.compile(r"\b(?:tt|amdg|amdgpu)\.(buffer_)?(load|store|atomic\w*)\b")
_BARRIER = re.compile(r"^(ttg|gpu)\.barrier\b|^ttg\.local_barrier\b")
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\], "
                     r"warpsPerCTA = \[(.*?)\],")  # fmt: skip
# Operations whose result points into the same memory as their first operand.
_KEEPS_BASE = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.bitcast",
               "ttg.convert_layout")  # fmt: skip


class RaceError(ValueError):
    """Two threads may access the same memory without a barrier."""


@dataclass(frozen=True)
class Access:
    """A load or a store; ``time`` distinguishes iterations of loops."""

    kind: Literal["load", "store"]
    pointer: str
    tile: str  # the tensor's type with its layout; empty for a scalar
    line: str
    time: tuple[int, ...] = ()


@dataclass
class _Block:
    """A region of code: its accesses, barriers ("barrier") and nested regions, in order."""

    kind: Literal["plain", "loop", "branch"] = "plain"
    body: list[Access | Literal["barrier"] | _Block] = field(default_factory=list)


def kinds(ttgir: str, argument: str) -> set[str]:
    """Return which of "load" and "store" a kernel performs on the memory at ``argument``."""
    return {access.kind for access in _flat(_parse(ttgir, argument)) if access != "barrier"}


def check_thread_owned(ttgir: str, argument: str) -> None:
    """Raise ``RaceError`` unless every element of the memory at ``argument`` is accessed by one thread only."""
    found = [access for access in _flat(_parse(ttgir, argument)) if access != "barrier"]
    for access in found:
        _check_layout(ttgir, argument, access)
    tiles = {access.tile for access in found}
    if len(tiles) != 1:
        raise RaceError(
            f"{argument} is accessed in {len(tiles)} layouts; there must be one: {', '.join(sorted(tiles)) or 'none'}"
        )


def check_ordered(ttgir: str, argument: str) -> None:
    """Raise ``RaceError`` unless barriers order all accesses of the memory at ``argument`` that may conflict."""
    open_accesses: list[Access] = []
    stored = False
    for access in _flat(_parse(ttgir, argument)):
        if access == "barrier":
            open_accesses = []
            continue
        stored |= access.kind == "store"
        for earlier in open_accesses:
            if earlier.kind == access.kind == "load":
                continue
            update = earlier.kind == "load" and (earlier.pointer, earlier.time) == (access.pointer, access.time)
            if not update:
                raise RaceError(
                    f"no barrier between two accesses of {argument}, a {earlier.kind} and a {access.kind}:"
                    f" {earlier.line} / {access.line}"
                )
            _check_layout(ttgir, argument, access)
        open_accesses.append(access)
    if not stored:
        raise RaceError(f"{argument} is never stored to; it must be a buffer through which threads exchange data")


def check_barriers_kept(asm: Mapping[str, str]) -> None:
    """Raise ``RaceError`` if the machine code ("ptx" or "amdgcn") has fewer barriers than "ttgir".

    AMD's compiler omits them for programs of one wavefront, whose accesses the hardware keeps in order.
    """
    written = sum(_BARRIER.match(line.strip()) is not None for line in asm["ttgir"].splitlines())
    if "ptx" in asm:
        kept = len(re.findall(r"^\s*(?:bar|barrier)(?:\.cta)?\.sync", asm["ptx"], re.MULTILINE))
    elif '"ttg.num-warps" = 1 ' in asm["ttgir"]:
        return
    else:
        kept = len(re.findall(r"^\s*s_barrier", asm["amdgcn"], re.MULTILINE))
    if kept < written:
        raise RaceError(f"the machine code has {kept} barriers but the kernel has {written}")


def _check_layout(ttgir: str, argument: str, access: Access) -> None:
    layouts = {found[1]: found.groups()[1:] for line in ttgir.splitlines() if (found := _LAYOUT.match(line))}
    shape, _, layout = access.tile.rpartition(", ")
    if layout not in layouts:
        raise RaceError(f"{argument} is accessed by every thread, not in a blocked layout: {access.line}")
    sizes = [int(size) for size in re.findall(r"(\d+)x", shape)]
    held = [prod(numbers) for numbers in zip(*(map(int, each.split(", ")) for each in layouts[layout]), strict=True)]
    if any(size % threads for size, threads in zip(sizes, held, strict=True)):
        raise RaceError(f"elements of {argument} are held by several threads: the layout is for {held}: {access.line}")


def _flat(block: _Block, time: tuple[int, ...] = ()) -> Iterator[Access | Literal["barrier"]]:
    """Yield accesses and barriers in order, the body of a loop twice, to cover paths around the loop.

    Barriers in branches are omitted, as a branch may not be taken.
    """
    for round_ in range(2 if block.kind == "loop" else 1):
        now = (*time, round_)
        for item in block.body:
            if isinstance(item, _Block):
                yield from (x for x in _flat(item, now) if x != "barrier" or item.kind != "branch")
            else:
                yield item if item == "barrier" else replace(item, time=now)


def _parse(ttgir: str, argument: str) -> _Block:
    """Parse the accesses of the memory at ``argument`` and all barriers."""
    found = re.search(rf'(%\w+): !tt\.ptr<[^>]*>[^%]*? loc\("{argument}"', ttgir)
    if found is None:
        raise ValueError(f"the kernel has no pointer {argument!r}")
    bases: dict[str, set[str]] = {found[1]: {argument}}
    stack = [_Block()]
    for line in ttgir.splitlines():
        statement = line.strip().split(" loc(")[0]
        _trace(statement, bases)
        if statement.startswith("}") and "do {" not in statement and len(stack) > 1:
            closed = stack.pop()
            stack[-1].body.append(closed)
        if statement.endswith("{") and "do {" not in statement:
            stack.append(_Block(_kind(statement)))
        access = _ACCESS.search(statement)
        if _BARRIER.match(statement):
            stack[-1].body.append("barrier")
        elif access is not None:
            operands = re.findall(r"%[\w#]+", statement[access.end() :])
            # A buffer store lists the stored value before the base pointer and the offsets.
            pointer = next((x for x in operands if bases.get(x)), None)
            if pointer is not None:
                kind_of = "load" if access[2] == "load" else "store"
                tile = re.findall(r"tensor<(.*, #\w+)>", statement[access.end() :])
                offsets = " ".join(operands) if access[1] else pointer
                stack[-1].body.append(Access(kind_of, offsets, _tile(tile), statement))  # type: ignore[arg-type]
    while len(stack) > 1:
        closed = stack.pop()
        stack[-1].body.append(closed)
    return stack[0]


def _kind(statement: str) -> Literal["plain", "loop", "branch"]:
    if re.search(r"\bscf\.(for|while)\b", statement):
        return "loop"
    return "branch" if re.search(r"\bscf\.(if|index_switch)\b|\belse\b", statement) else "plain"


def _tile(found: list[str]) -> str:
    """Return shape and layout of a type such as "64x!tt.ptr<f32>, #blocked", without the element type."""
    if not found:
        return ""
    sizes = "".join(re.findall(r"\d+x", found[0].split(", ")[0]))
    return f"{sizes}, {found[0].rpartition(', ')[2]}"


def _trace(statement: str, bases: dict[str, set[str]]) -> None:
    """Add to ``bases`` those results of ``statement`` that point into the same memory as its operands."""
    for name, start in re.findall(r"(%\w+) = (%[\w#]+)", statement):  # iter_args
        bases[name] = bases.get(start, set())
    found = re.match(r"(%\w+)(?::\d+)? = ([\w.]+)", statement)
    if found is None:
        return
    name, operation = found.groups()
    operands = re.findall(r"%[\w#]+", statement[found.end() :])
    if operation in _KEEPS_BASE:
        bases[name] = bases.get(operands[0], set())
    elif operation == "arith.select":
        bases[name] = set().union(*(bases.get(x, set()) for x in operands[1:]))
    elif operation == "scf.for":
        starts = re.findall(r"%\w+ = (%[\w#]+)", statement.partition("iter_args")[2])
        for i, start in enumerate(starts):
            bases[f"{name}#{i}" if len(starts) > 1 else name] = bases.get(start, set())
    else:
        # A name of one loop's body may mean something else in the next.
        bases.pop(name, None)
