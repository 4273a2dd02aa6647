"""Emits one template either as a GPU program of threads, or as sequential loops on a CPU for tests.

A template is a list of phases. Within a phase, no thread reads what another one writes, so on a CPU a phase is a loop
over the threads, in either order. Phases that exchange data are separated by a barrier, which the sequential loops do
not need. Shared memory is a buffer of the program; what a thread keeps between phases is private.
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
        cuda: bind threads to threadIdx.x; if False, emit loops.
        reverse: loop from the last thread to the first; if results differ, a phase has a race.
    """

    def __init__(self, count: int, cuda: bool, reverse: bool = False) -> None:
        self.count, self.cuda, self.reverse = count, cuda, reverse
        self.shared_bytes = 0
        self._here: Any = None
        self._order: Any = None

    @contextmanager
    def program(self) -> Iterator[None]:
        """Emit phases within this block."""
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
        """Emit ``body(thread)`` for every thread."""
        if self.cuda:
            body(self._here)
            return
        with builder.serial(0, self.count) as thread:
            body(self._order[thread] if self.reverse else thread)

    def share(self, count: int, body: Callable[[Any, Any, int], None]) -> None:
        """Emit ``body(item, thread, turn)`` for ``count`` items distributed over the threads, with unrolled turns."""
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
        """Emit ``body(item)`` for ``count`` items distributed over the threads, in a loop."""

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
        """Emit ``load(item, into, at)`` and ``put(item, from, at)`` for ``count`` items of ``width`` elements.

        Several items are loaded before the first is stored, so that their latencies overlap.
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
        """Emit sums of each of ``count`` values over the threads of a warp whose indices differ in bits ``strides``.

        While the number of values is even, each thread of a pair sums one half of them, which takes fewer exchanges
        than if both summed all. A thread's sums are at the beginning of its ``values``.
        """
        halves = []
        for stride in strides:
            half = count // 2 if count % 2 == 0 else 0
            count = half or count
            (self._exchange if self.cuda else self._exchange_in_loops)(values, count, half, stride)
            halves.append((stride, half))
        return Folded(count, tuple(halves))

    def _exchange(self, values: Private, count: int, half: int, stride: int) -> None:
        """Emit adding the values of thread ^ stride to the half of the thread's values that its bit selects."""
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
        """Return a quotient. On a GPU, float32 has an error of up to 2 ulp, as an exact division is a function call."""
        if self.cuda and dtype == "float32":
            return tir.call_extern("float32", "__fdividef", dividend, divisor)
        return dividend / divisor

    def multiply_add(self, a: Any, b: Any, c: Any, dtype: str) -> Any:
        """Return a · b + c, on a GPU as an explicit FMA; given two products, nvcc may fuse the wrong one."""
        if self.cuda:
            return tir.call_extern(dtype, "__fmaf_rn" if dtype == "float32" else "__fma_rn", a, b, c)
        return a * b + c

    def barrier(self) -> None:
        """Emit a barrier, after which threads may read what others wrote before it."""
        if self.cuda:
            builder.evaluate(synchronise(self.count <= WARP))

    def shared(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate a buffer that all threads of the program share."""
        size = tvm.DataType(dtype).bits // 8 * math.prod(shape)
        self.shared_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        return T.sblock_alloc_buffer(shape, dtype, scope="shared.dyn" if self.cuda else "global")

    def bound(self, function: Any, ordered: bool = False) -> Any:
        """Return the function that the threads were emitted in, with its bytes of dynamic shared memory."""
        function = function.with_attr("shared_bytes", self.shared_bytes)
        return function.with_attr(ORDERED, True) if ordered else function

    def private(self, size: int, dtype: str) -> Private:
        """Allocate ``size`` values per thread that are kept between phases."""
        return Private(self, size, dtype)


class Private:
    """Registers of each thread; on a CPU, one row of a buffer per thread."""

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
    """The sums that a thread holds after ``Threads.fold``: ``count`` of them; ``halves`` by stride, 0 if not halved."""

    count: int
    halves: tuple[tuple[int, int], ...]

    def first(self, thread: Any) -> Any:
        """Return the index of the thread's first sum."""
        return sum((_bit(thread, stride) * half for stride, half in self.halves), tir.const(0, "int32"))

    def leads(self, thread: Any) -> Any:
        """Return whether the thread is the first of those that hold the same sums."""
        bits = [_bit(thread, stride) == 0 for stride, half in self.halves if not half]
        return tir.all(tir.const(True, "bool"), *bits)


def _bit(thread: Any, stride: int) -> Any:
    return thread // stride % 2


def synchronise(warp: bool) -> Any:
    """Return the call of a barrier for a warp or the whole program."""
    if warp:
        return tir.call_extern("int32", "__syncwarp")
    return tir.call_intrin("int32", "tirx.tvm_storage_sync", "shared")
