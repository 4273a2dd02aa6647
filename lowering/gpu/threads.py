"""One template for two machines: a GPU program of threads, or loops on a CPU that do the same work in turn.

A template is a list of phases. Within a phase no thread reads what another one writes, so on the CPU a phase is a loop
over the threads, in either order. Between phases that exchange data stands a barrier, which the CPU does without: its
loops run one after another. Shared memory is a buffer of the program; what a thread keeps from one phase to the next
is private.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit

WARP = 32
# Attribute of a function whose loads must stay between the barriers where they are written. Without it nvcc moves
# prefetches to the end of the loop, where the next iteration then waits for them.
ORDERED = "ordered"
_ALIGNMENT = 64  # bytes; buffers in shared memory start at multiples of it
_CARRIED = 16  # loads that a thread has in flight when it copies many items


class Threads:
    """The ``count`` threads of a program.

    Args:
        cuda: bound to threadIdx.x, else loops.
        reverse: the CPU's loops go from the last thread to the first; results that differ betray a race in a phase.
    """

    def __init__(self, count: int, cuda: bool, reverse: bool = False) -> None:
        self.count, self.cuda, self.reverse = count, cuda, reverse
        self.shared_bytes = 0
        self._here: Any = None
        self._order: Any = None

    @contextmanager
    def program(self) -> Iterator[None]:
        """Phases are emitted within this block."""
        if not self.cuda:
            if self.reverse:
                # The order is read from memory: TVM's simplifier rewrites count − 1 − i in indices wrongly.
                self._order = T.sblock_alloc_buffer((self.count,), "int32")
                with builder.serial(0, self.count) as i:
                    builder.buffer_store(self._order, self.count - 1 - i, [i])
            yield
            return
        with builder.thread_binding(0, self.count, thread="threadIdx.x") as thread:
            self._here = thread
            yield

    def each(self, body: Callable[[Any], None]) -> None:
        """``body(thread)`` for every thread."""
        if self.cuda:
            body(self._here)
            return
        with builder.serial(0, self.count) as thread:
            body(self._order[thread] if self.reverse else thread)

    def share(self, count: int, body: Callable[[Any, Any, int], None]) -> None:
        """``body(item, thread, turn)`` for ``count`` items dealt out to the threads in turns, in straight code."""
        turns = -(-count // self.count)

        def mine(thread: Any) -> None:
            for turn in range(turns):
                item = thread + turn * self.count
                if (turn + 1) * self.count <= count:
                    body(item, thread, turn)
                else:
                    with builder.If(item < count), builder.Then():
                        body(item, thread, turn)

        self.each(mine)

    def spread(self, count: Any, body: Callable[[Any], None]) -> None:
        """``body(item)`` for ``count`` items dealt out to the threads, in a loop."""

        def mine(thread: Any) -> None:
            with builder.serial(0, (count + self.count - 1) // self.count) as turn:
                item = turn * self.count + thread
                if isinstance(count, int) and count % self.count == 0:
                    body(item)
                else:
                    with builder.If(item < count), builder.Then():
                        body(item)

        self.each(mine)

    def carry(self, count: int, width: int, dtype: str, load: Callable[[Any, Any, list[Any]], None],
              put: Callable[[Any, Any, list[Any]], None]) -> None:  # fmt: skip
        """``load(item, into, at)`` and ``put(item, from, at)`` for ``count`` items of ``width`` numbers of ``dtype``.

        Several items' loads are under way at a time: one by one, each would wait for the last one's.
        """
        each, held = _CARRIED * self.count, self.private(_CARRIED * width, dtype)

        def items(step: Callable[[Any, Any, list[Any]], None], turn: Any, thread: Any) -> None:
            for j in range(_CARRIED):
                item, at = (turn * _CARRIED + j) * self.count + thread, held.at(thread, j * width)
                if count % each == 0:
                    step(item, held.buffer, at)
                else:
                    emit.below(item, count, lambda i, at=at: step(i, held.buffer, at))  # type: ignore[misc]

        with builder.serial(0, -(-count // each)) as turn:
            for step in (load, put):
                self.each(lambda thread, step=step: items(step, turn, thread))  # type: ignore[misc]
                # The barrier keeps the compiler from moving each load down to its store.
                self.barrier()

    def fold(self, values: Private, count: int, strides: Sequence[int]) -> Folded:
        """Sum each of ``count`` values over the threads of a warp whose numbers differ in the bits ``strides``.

        While the number of values is even, a thread gives half of them to the other one: fewer exchanges than if each
        summed all. The sums that a thread ends with stand at the beginning of its ``values``.
        """
        halves = []
        for stride in strides:
            half = count // 2 if count % 2 == 0 else 0
            count = half or count
            (self._exchange if self.cuda else self._exchange_in_loops)(values, count, half, stride)
            halves.append((stride, half))
        return Folded(count, tuple(halves))

    def _exchange(self, values: Private, count: int, half: int, stride: int) -> None:
        """A value and the same one of thread ^ stride, for the half of the values that the thread's bit tells."""
        sent = emit.registers(True, count, values.dtype)
        upper = _bit(self._here, stride) == 1
        for j in range(count):
            low, high = values.buffer[j], values.buffer[j + half]
            builder.buffer_store(sent, tir.Select(upper, low, high) if half else low, [j])
            if half:
                builder.buffer_store(values.buffer, tir.Select(upper, high, low), [j])
        for j in range(count):
            theirs = tir.call_extern(values.dtype, "__shfl_xor_sync", tir.const(0xFFFFFFFF, "uint32"), sent[j], stride)
            builder.buffer_store(values.buffer, values.buffer[j] + theirs, [j])

    def _exchange_in_loops(self, values: Private, count: int, half: int, stride: int) -> None:
        before = T.sblock_alloc_buffer(values.buffer.shape, values.dtype)
        with builder.serial(0, self.count) as thread, builder.serial(0, values.size) as j:
            builder.buffer_store(before, values.buffer[thread, j], [thread, j])

        def add(thread: Any) -> None:
            other = thread + stride - _bit(thread, stride) * (2 * stride)
            for j in range(count):
                at = j + _bit(thread, stride) * half
                values.store(thread, j, before[thread, at] + before[other, at])

        self.each(add)

    def quotient(self, dividend: Any, divisor: Any, dtype: str) -> Any:
        """A float32 quotient on a GPU is within 2 units of the last place: an exact one is a call."""
        if self.cuda and dtype == "float32":
            return tir.call_extern("float32", "__fdividef", dividend, divisor)
        return dividend / divisor

    def multiply_add(self, a: Any, b: Any, c: Any, dtype: str) -> Any:
        """a · b + c, rounded once on a GPU: of two products, nvcc would fuse the one that is known first."""
        if self.cuda:
            return tir.call_extern(dtype, "__fmaf_rn" if dtype == "float32" else "__fma_rn", a, b, c)
        return a * b + c

    def barrier(self) -> None:
        """What threads wrote before it, others may read after it."""
        if self.cuda:
            builder.evaluate(synchronise(self.count <= WARP))

    def shared(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer that all threads of the program use."""
        size = tvm.DataType(dtype).bits // 8 * math.prod(shape)
        self.shared_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        return T.sblock_alloc_buffer(shape, dtype, scope="shared.dyn" if self.cuda else "global")

    def bound(self, function: Any, ordered: bool = False) -> Any:
        """The function that they were emitted in, with the bytes of shared memory that a launch must ask for."""
        function = function.with_attr("shared_bytes", self.shared_bytes)
        return function.with_attr(ORDERED, True) if ordered else function

    def private(self, size: int, dtype: str) -> Private:
        """``size`` values of each thread, kept from phase to phase."""
        return Private(self, size, dtype)


class Private:
    """Registers of each thread; on the CPU a row of a buffer a thread."""

    def __init__(self, threads: Threads, size: int, dtype: str) -> None:
        self.cuda, self.size, self.dtype = threads.cuda, size, dtype
        shape = (size,) if self.cuda else (threads.count, size)
        self.buffer = T.sblock_alloc_buffer(shape, dtype, scope="local" if self.cuda else "global")

    def at(self, thread: Any, i: Any) -> list[Any]:
        return [i] if self.cuda else [thread, i]

    def load(self, thread: Any, i: Any) -> Any:
        return self.buffer[tuple(self.at(thread, i))]

    def store(self, thread: Any, i: Any, value: Any) -> None:
        builder.buffer_store(self.buffer, value, self.at(thread, i))


@dataclass(frozen=True)
class Folded:
    """Which sums a thread ends with after ``Threads.fold``: ``count`` of them; ``halves`` by stride, 0 for none."""

    count: int
    halves: tuple[tuple[int, int], ...]

    def first(self, thread: Any) -> Any:
        """The number of the first one."""
        return sum((_bit(thread, stride) * half for stride, half in self.halves), tir.const(0, "int32"))

    def leads(self, thread: Any) -> Any:
        """Of the threads that end with the same sums, one."""
        bits = [_bit(thread, stride) == 0 for stride, half in self.halves if not half]
        return tir.all(tir.const(True, "bool"), *bits)


def _bit(thread: Any, stride: int) -> Any:
    return thread // stride % 2


def synchronise(warp: bool) -> Any:
    """The call that makes threads wait for one another: those of a warp, or the whole program."""
    if warp:
        return tir.call_extern("int32", "__syncwarp")
    return tir.call_intrin("int32", "tirx.tvm_storage_sync", "shared")
