"""One template for two machines: a GPU program of threads, or loops on a CPU that do the same work in turn.

A template is a list of phases. Within a phase no thread reads what another one writes, so on the CPU a phase is a loop
over the threads, in either order. Between phases that exchange data stands a barrier, which the CPU does without: its
loops run one after another. Shared memory is a buffer of the program; what a thread keeps from one phase to the next
is private.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

WARP = 32
_ALIGNMENT = 64  # bytes, of a buffer in shared memory


class Threads:
    """The ``count`` threads of a program.

    Args:
        cuda: bound to threadIdx.x, else loops.
        backwards: the CPU's loops go from the last thread to the first; results that differ betray a race in a phase.
    """

    def __init__(self, count: int, cuda: bool, backwards: bool = False) -> None:
        self.count, self.cuda, self.backwards = count, cuda, backwards
        self.shared_bytes = 0
        self._here: Any = None
        self._order: Any = None

    @contextmanager
    def program(self) -> Iterator[None]:
        """Phases are emitted within this block."""
        if not self.cuda:
            if self.backwards:
                # From memory: written as count − 1 − i in indices, TVM's simplifier goes astray.
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
            body(self._order[thread] if self.backwards else thread)

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

    def barrier(self, warp: bool = False) -> None:
        """What threads wrote before it, others may read after it; ``warp``: only threads of one warp exchange data."""
        if self.cuda:
            builder.evaluate(synchronise(warp or self.count <= WARP))

    def shared(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer that all threads of the program use."""
        size = tvm.DataType(dtype).bits // 8 * math.prod(shape)
        self.shared_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        return T.sblock_alloc_buffer(shape, dtype, scope="shared.dyn" if self.cuda else "global")

    def bound(self, function: Any) -> Any:
        """The function that they were emitted in, with the bytes of shared memory that a launch must ask for."""
        return function.with_attr("shared_bytes", self.shared_bytes)

    def private(self, size: int, dtype: str) -> Private:
        """``size`` values of each thread, kept from phase to phase."""
        return Private(self, size, dtype)


class Private:
    """Registers of each thread; on the CPU a row of a buffer a thread."""

    def __init__(self, threads: Threads, size: int, dtype: str) -> None:
        self.cuda = threads.cuda
        shape = (size,) if self.cuda else (threads.count, size)
        self.buffer = T.sblock_alloc_buffer(shape, dtype, scope="local" if self.cuda else "global")

    def at(self, thread: Any, i: Any) -> list[Any]:
        return [i] if self.cuda else [thread, i]

    def load(self, thread: Any, i: Any) -> Any:
        return self.buffer[tuple(self.at(thread, i))]

    def store(self, thread: Any, i: Any, value: Any) -> None:
        builder.buffer_store(self.buffer, value, self.at(thread, i))


def synchronise(warp: bool) -> Any:
    """The call that makes threads wait for one another: those of a warp, or the whole program."""
    if warp:
        return tir.call_extern("int32", "__syncwarp")
    return tir.call_intrin("int32", "tirx.tvm_storage_sync", "shared")


def chosen(condition: Any, value: Any, otherwise: Any) -> Any:
    """``value`` where the condition holds; it is not evaluated elsewhere."""
    return tir.if_then_else(condition, value, otherwise)
