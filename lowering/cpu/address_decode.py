"""address_decode in TIR: a branch-free top-K of the product softmax. Each vector lane decodes one row of logits.

The sorted beam of the K best prefixes is extended by one sub-vector at a time. The digits of the sub-vector are sorted
first. Extending the beam by the j-th best digit gives a sorted list, of which at most K/(j + 1) entries can be among
the best K. Sorted lists are merged as in bitonic sort: take the larger of a_i and b_(K−1−i) for each i, then do log2 K
rounds of compare-exchange.

The largest logit of each sub-vector is subtracted first, so a score is a log-probability relative to that of the best
prefix, which is 0. A row with a NaN gets weights of NaN, and slots that are still distinct and in range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.emit import Emit
from schedules.cpu import AddressDecode
from schedules.workload import Workload

# Logits are clamped to _LOWEST. _NOTHING, the score of an empty beam entry, is below every sum of clamped logits.
_NOTHING, _LOWEST = -3e38, -1e30
# A float32 weight below this becomes 0. Beside a weight of 1 it changes no sum, but its products with values may be
# subnormal: a scan of saturated addresses takes 12 times as long with them, and its backward pass 7 times.
_NEGLIGIBLE = 2.0**-100


def module(workload: Workload, schedule: AddressDecode) -> Any:
    """Return the kernel's IRModule.

    Its parameters are logits [R, U, P] and the outputs slots int32 [R, K] and weights [R, K]. R is dynamic and must be
    at least ``lanes``: the last vector starts early and decodes some rows again instead of exceeding the end.
    """
    U, P, K = (workload.shape[axis] for axis in "UPK")
    dtype, lanes = workload.dtype, schedule.lanes

    @T.prim_func(s_tir=True)
    def address_decode(logits: T.handle, slots: T.handle, weights: T.handle):
        T.func_attr({"global_symbol": "address_decode", "tir.noalias": True})
        rows = T.int64()
        X = emit.argument(logits, (rows, U, P), dtype)
        S = emit.argument(slots, (rows, K), "int32")
        W = emit.argument(weights, (rows, K), dtype)
        for b in T.serial((rows + lanes - 1) // lanes):
            with T.sblock("decode"):
                vb = T.axis.spatial((rows + lanes - 1) // lanes, b)
                T.reads(X[0:rows, 0:U, 0:P])
                T.writes(S[0:rows, 0:K], W[0:rows, 0:K])
                first = T.sblock_alloc_buffer((1,), "int32")
                first[0] = T.min(vb * lanes, rows - lanes)
                Decoder(workload, lanes, schedule.unroll).emit(first[0], X, S, W)

    plan = tvm.s_tir.Schedule(address_decode)
    if schedule.parallel:
        plan.parallel(*plan.get_loops(plan.get_sblock("decode")))
    return plan.mod


class _Lanes:
    """Stores to every vector lane, those of unrolled code in one vectorised loop.

    With a loop for each store, the machine code is the same, but at each access TVM's FlattenBuffer takes time in
    proportion to the number of loops before it: the kernel of U = 5, P = 4, K = 8 with unroll = 2 compiles in 6.0 s
    instead of 2.1.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._lane: Any = None

    @contextmanager
    def together(self) -> Iterator[None]:
        with builder.vectorized(0, self.width) as self._lane:
            yield
        self._lane = None

    def store(self, *stores: tuple[Any, list[Any], Emit]) -> None:
        """Emit ``buffer[*row, lane] = value(lane)`` for each store in turn."""
        if self._lane is None:
            emit.lanes(self.width, *stores)
            return
        for buffer, row, value in stores:
            emit.store(buffer, [*row, self._lane], value(self._lane))


class _Pairs:
    """``count`` vectors of scores, each with a vector of int32 labels that is moved along with it.

    In unrolled code each vector is a separate buffer, which LLVM keeps in a register; in loops they are rows of one.
    """

    def __init__(self, count: int, lanes: _Lanes, dtype: str, straight: bool, scope: str) -> None:
        self.count, self.lanes, self.straight = count, lanes, straight
        shape, copies = ((lanes.width,), count) if straight else ((count, lanes.width), 1)
        self._scores = [T.sblock_alloc_buffer(shape, dtype, scope=scope) for _ in range(copies)]
        self._labels = [T.sblock_alloc_buffer(shape, "int32", scope=scope) for _ in range(copies)]

    def score(self, i: Any, lane: Any) -> Any:
        return self._scores[i][lane] if self.straight else self._scores[0][i, lane]

    def label(self, i: Any, lane: Any) -> Any:
        return self._labels[i][lane] if self.straight else self._labels[0][i, lane]

    def set(self, i: Any, score: Emit, label: Emit) -> None:
        """Store the label first, as its value may depend on the old score."""
        if self.straight:
            self.lanes.store((self._labels[i], [], label), (self._scores[i], [], score))
        else:
            self.lanes.store((self._labels[0], [i], label), (self._scores[0], [i], score))


class Decoder:
    """Emits code that decodes ``lanes`` rows; a thread of a GPU decodes one. ``scope`` is that of the local buffers."""

    def __init__(self, workload: Workload, lanes: int, unroll: int, scope: str = "global") -> None:
        self.order, self.sub_dim, self.top_k = (workload.shape[axis] for axis in "UPK")
        self.dtype, self.lanes, self.unroll = emit.sum_type(workload.dtype), _Lanes(lanes), unroll
        self.width = 1 << (self.top_k - 1).bit_length()  # K rounded up to a power of two, for the bitonic rule
        self.ranks = min(self.sub_dim, self.top_k)
        self.straight = unroll > 0

        def pairs(count: int, straight: bool = self.straight) -> _Pairs:
            return _Pairs(count, self.lanes, self.dtype, straight, scope)

        self.logits, self.digits = pairs(self.sub_dim), pairs(self.ranks)
        self.beam, self.joined = pairs(self.width), pairs(self.width)
        self.one, self.spare = pairs(1, True), pairs(1, True)
        # norm = Π_u total, total = Σ_p e^(logit − max)
        self.norm, self.total, self.largest = (
            T.sblock_alloc_buffer((lanes,), self.dtype, scope=scope) for _ in range(3)
        )
        self.step = T.sblock_alloc_buffer((1,), "int32", scope=scope)  # P^u

    def emit(self, first: Any, X: Any, S: Any, W: Any) -> None:
        """Emit the decoding of the rows from ``first``: logits X [R, U, P] to slots S and weights W [R, K]."""
        self.lanes.store((self.norm, [], self.number(1)))
        self.loop(0, self.width, lambda i: self.beam.set(i, self.number(_NOTHING), self.whole(0)))
        self.beam.set(0, self.number(0), self.whole(0))
        emit.store(self.step, [0], emit.constant(1, "int32"))
        prefixes = 1
        if self.unroll == 2:
            for u in range(self.order):
                self.level(first, X, u, prefixes)
                prefixes = min(self.width, prefixes * self.sub_dim)
        else:
            self.level(first, X, 0, 1)
            if self.order > 1:
                with builder.serial(1, self.order) as u:
                    self.level(first, X, u, self.width)

        def put(k: Any) -> None:
            with builder.vectorized(0, self.lanes.width) as lane:
                emit.store(S, [first + lane, k], self.beam.label(k, lane))
                weight = emit.exp(self.beam.score(k, lane), self.dtype) / self.norm[lane]
                if self.dtype == "float32":
                    negligible = weight < emit.constant(_NEGLIGIBLE, self.dtype)  # False for NaN
                    weight = tir.Select(negligible, emit.constant(0, self.dtype), weight)
                emit.store(W, [first + lane, k], weight.astype(W.dtype))

        self.loop(0, self.top_k, put)

    def level(self, first: Any, X: Any, u: Any, prefixes: int) -> None:
        """Extend the beam, which holds ``prefixes`` entries, by sub-vector ``u``."""
        # TVM moves a buffer into the only loop that uses it. In a vectorised one, all lanes would share an element.
        with self.lanes.together() if self.straight and self.order > 1 else nullcontext():
            self.extend_beam(first, X, u, prefixes)
        emit.store(self.step, [0], self.step[0] * emit.constant(self.sub_dim, "int32"))

    def extend_beam(self, first: Any, X: Any, u: Any, prefixes: int) -> None:
        self.load(first, X, u)
        self.sort_digits()
        self.loop(0, self.width, lambda i: self.extend(self.joined, i, i, 0))

        def join(j: Any) -> None:
            survivors = min(self.top_k // (j + 1), prefixes) if self.straight else self.top_k // (j + 1)

            def keep(i: Any) -> None:
                self.extend(self.one, 0, i, j)
                self.keep_larger(self.width - 1 - i)

            self.loop(0, survivors, keep)
            self.sort_joined()

        self.loop(1, self.ranks, join)
        self.loop(
            0,
            self.width,
            lambda i: self.beam.set(
                i, lambda lane: self.joined.score(i, lane), lambda lane: self.joined.label(i, lane)
            ),
        )

    def load(self, first: Any, X: Any, u: Any) -> None:
        """Load the sub-vector's logits minus their maximum, clamped, and multiply ``norm`` by Σ_p e^(logit − max)."""
        largest, total = self.largest, self.total

        def read(p: Any) -> None:
            self.logits.set(p, lambda lane: X[first + lane, u, p].astype(self.dtype), self.whole(p))
            self.lanes.store((largest, [], lambda lane: tir.max(largest[lane], self.logits.score(p, lane))))

        def relate(p: Any) -> None:
            def above(lane: Any) -> Any:
                return self.logits.score(p, lane) - largest[lane]

            self.lanes.store((total, [], lambda lane: total[lane] + emit.exp(above(lane), self.dtype)))
            lowest = emit.constant(_LOWEST, self.dtype)
            self.logits.set(p, lambda lane: tir.max(above(lane), lowest), self.whole(p))

        self.lanes.store((largest, [], self.number(-math.inf)), (total, [], self.number(0)))
        self.loop(0, self.sub_dim, read)
        self.loop(0, self.sub_dim, relate)
        self.lanes.store((self.norm, [], lambda lane: self.norm[lane] * total[lane]))

    def sort_digits(self) -> None:
        """Insert the P logits one by one into the sorted list ``digits``, descending, dropping the smallest."""
        self.loop(0, self.ranks, lambda j: self.digits.set(j, self.number(_NOTHING), self.whole(0)))

        def insert(p: Any) -> None:
            self.one.set(0, lambda lane: self.logits.score(p, lane), lambda lane: self.logits.label(p, lane))
            places = min(p + 1, self.ranks) if self.straight else self.ranks
            self.loop(0, places, lambda j: self.exchange(self.digits, j, self.one, 0))

        self.loop(0, self.sub_dim, insert)

    def extend(self, out: _Pairs, o: Any, i: Any, j: Any) -> None:
        """Extend beam entry ``i`` by digit ``j``: add the scores, and add digit·P^u to the slot."""
        out.set(
            o,
            lambda lane: self.beam.score(i, lane) + self.digits.score(j, lane),
            lambda lane: self.beam.label(i, lane) + self.digits.label(j, lane) * self.step[0],
        )

    def keep_larger(self, i: Any) -> None:
        """Set ``joined[i]`` to the larger of ``joined[i]`` and ``one``."""
        x, y = self.joined, self.one
        x.set(
            i,
            lambda lane: tir.max(x.score(i, lane), y.score(0, lane)),
            lambda lane: tir.Select(y.score(0, lane) > x.score(i, lane), y.label(0, lane), x.label(i, lane)),
        )

    def exchange(self, x: _Pairs, i: Any, y: _Pairs, j: Any) -> None:
        """Store the larger of ``x[i]`` and ``y[j]`` in ``x[i]``, the smaller in ``y[j]``."""
        old = self.spare
        old.set(0, lambda lane: x.score(i, lane), lambda lane: x.label(i, lane))
        x.set(
            i,
            lambda lane: tir.max(old.score(0, lane), y.score(j, lane)),
            lambda lane: tir.Select(y.score(j, lane) > old.score(0, lane), y.label(j, lane), old.label(0, lane)),
        )
        y.set(
            j,
            lambda lane: tir.min(old.score(0, lane), y.score(j, lane)),
            lambda lane: tir.Select(y.score(j, lane) > old.score(0, lane), old.label(0, lane), y.label(j, lane)),
        )

    def sort_joined(self) -> None:
        """Sort the bitonic sequence ``joined``, descending."""

        def rounds(r: Any) -> None:
            stride = self.width >> (r + 1)

            def compare(c: Any) -> None:
                i = c // stride * (2 * stride) + c % stride
                self.exchange(self.joined, i, self.joined, i + stride)

            self.loop(0, self.width // 2, compare)

        self.loop(0, self.width.bit_length() - 1, rounds)

    def loop(self, start: int, stop: Any, body: Callable[[Any], None]) -> None:
        """Emit ``body`` for start..stop−1, unrolled or in a loop."""
        if self.straight:
            for i in range(start, stop):
                body(i)
        else:
            with builder.serial(0, stop - start) as i:
                body(i + start)

    def number(self, value: float) -> Emit:
        return lambda _: emit.constant(value, self.dtype)

    def whole(self, value: Any) -> Emit:
        return lambda _: emit.constant(value, "int32") if isinstance(value, int) else value
