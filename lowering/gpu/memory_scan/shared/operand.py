"""Loads per-token arrays from global through shared memory to the threads of a ``TokenWalk``."""

from __future__ import annotations

import math
from typing import Any

import tvm.tirx as tir
from tvm.script import tirx as T

from lowering import emit


class Operand:
    """A chunk of an array's tokens in shared memory, in the dtype of sums; slots stay int32.

    A thread uses the values of its slots, of its channels, or of its channels in each of its slots. The last kind keeps
    the array's dtype until it is used, to save shared memory.

    The next chunk is prefetched into registers. bfloat16 pairs stay packed there, because unpacking stalls on the load.

    Args:
        walk: the ``TokenWalk``.
        buffer: [N, T, ...], followed by K if ``by_slot`` and by channels if ``by_channel``.
    """

    def __init__(self, walk: Any, buffer: Any, by_slot: bool, by_channel: bool) -> None:
        self.walk, self.threads, self.dtype = walk, walk.threads, str(buffer.dtype)
        self.by_slot, self.by_channel, self.raw = by_slot, by_channel, by_slot and by_channel
        self.slots = self.dtype == "int32"
        # Elements per token and per load of a thread; a thread computes with ``runs`` runs of ``run`` elements.
        self.row = (walk.K if by_slot else 1) * (walk.tile if by_channel else 1)
        # A thread loads several elements at once, if all threads then have something to load.
        wide = max(walk.chunk * walk.K // walk.threads.count, 1)
        self.moved = walk.channels if by_channel else math.gcd(walk.K, 4 if wide >= 4 else 2 if wide >= 2 else 1)
        self.runs: int = walk.width if self.raw else 1
        self.run: int = walk.channels if by_channel else walk.width
        self.packed = 2 if self.dtype in ("bfloat16", "float16") and self.moved % 2 == 0 else 1
        self.buffer = buffer
        if self.packed > 1:
            shape = (*buffer.shape[:-1], buffer.shape[-1] // self.packed)
            self.buffer = T.decl_buffer(shape, "uint32", data=buffer.data)
        word = str(self.buffer.dtype)
        self.items, self.words = walk.chunk * self.row // self.moved, self.moved // self.packed
        self.coming = self.threads.private(-(-self.items // self.threads.count) * self.words, word)
        kind = word if self.raw or self.slots else walk.sums
        self.dense = self.packed if self.raw else 1  # numbers per element of the buffer
        self.here = self.threads.shared((walk.chunk, self.row // self.dense), kind)
        self.held = self.threads.private(2 * self.runs * self.run // self.dense, kind)

    def ask(self, c: Any, whole: bool) -> None:
        """Emit the loads of chunk ``c`` into registers; if it is not ``whole``, missing tokens get value 0, slot k."""
        walk = self.walk

        def item(e: Any, thread: Any, turn: int) -> None:
            i, first = self._place(e)
            t, channel = c * walk.chunk + i, walk.g * walk.tile + first % walk.tile
            # The index is clamped so that the load needs no branch: branches would be most of the code.
            at = [walk.n, t if whole else tir.min(t, walk.tokens - 1)]
            if self.by_slot:
                at.append(first // walk.tile if self.by_channel else first // self.packed)
            if self.by_channel:
                last = self.buffer.shape[-1] - self.words
                at.append(tir.min(channel // self.packed, last) if walk.D % walk.tile else channel // self.packed)
            place = self.coming.at(thread, turn * self.words)
            emit.copy(self.coming.buffer, place, self.buffer, at, self.words)
            for word in range(0 if whole else self.words):
                nothing = first + word if self.slots else emit.constant(0, self.coming.dtype)
                number = self.coming.load(thread, turn * self.words + word)
                self.coming.store(thread, turn * self.words + word, tir.Select(t < walk.tokens, number, nothing))

        self.threads.share(self.items, item)

    def put(self) -> None:
        """Emit the stores of the loaded chunk to shared memory, with 0 for channels beyond the last."""
        walk = self.walk

        def item(e: Any, thread: Any, turn: int) -> None:
            def word(j: int) -> Any:
                number = self.coming.load(thread, turn * self.words + j)
                if not self.by_channel or walk.D % walk.tile == 0:
                    return number
                return tir.Select(inside, number, emit.constant(0, self.coming.dtype))

            i, first = self._place(e)
            count = self.words if self.raw else self.moved
            inside = walk.g * walk.tile + first % walk.tile < walk.D
            emit.put(self.threads.cuda, self.here, [i, first // self.dense], count,
                     word if self.raw else lambda j: self._number(word(j // self.packed), j % self.packed))  # fmt: skip

        self.threads.share(self.items, item)

    def fetch(self, thread: Any, i: Any, turn: int) -> None:
        """Emit loads of the thread's values of the chunk's ``i``-th token into one of two sets of registers."""
        for j in range(self.runs):
            slot, column = self.walk.slot(thread, j), self.walk.column(thread)
            first = slot * self.walk.tile + column if self.raw else column if self.by_channel else slot
            place = self.held.at(thread, (turn % 2 * self.runs + j) * self.run // self.dense)
            emit.copy(self.held.buffer, place, self.here, [i, first // self.dense], self.run // self.dense)

    def get(self, thread: Any, turn: int, j: int) -> Any:
        """Return the ``j``-th of the values that ``fetch`` has loaded."""
        place = turn % 2 * self.runs * self.run + j
        held = self.held.load(thread, place // self.dense)
        return self._number(held, place % self.dense).astype(self.walk.sums) if self.raw else held

    def _place(self, e: Any) -> tuple[Any, Any]:
        """Return the token of the ``e``-th element that a thread moves, and the element's index within the token."""
        each = self.row // self.moved
        return e // each, e % each * self.moved

    def _number(self, word: Any, half: int) -> Any:
        if self.packed == 1:
            return word
        if self.dtype == "bfloat16":
            high = word & emit.constant(0xFFFF0000, "uint32") if half else word << emit.constant(16, "uint32")
            return tir.reinterpret("float32", high)
        return tir.reinterpret(self.dtype, (word >> emit.constant(16 * half, "uint32")).astype("uint16"))
