"""decode_layer in TIR: a whole RAM-Net layer on one token, updating its state in place.

A layer called from Python is about 40 small calls, whose code and data the weights evict from the caches in between.
Here it is one function. The matrix products are parallel loops that read the weights once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.ir import IRModule
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.cpu.address_decode import Decoder
from lowering.cpu.memory_step import Places, prefetch, token
from lowering.cpu.project import dots
from ramnet.ops.accesses import Accesses
from schedules.base import largest_divisor
from schedules.cpu import DecodeLayer, MemoryStep
from schedules.workload import Workload

Pair = tuple[Any, Any]  # of buffers


def module(workload: Workload, schedule: DecodeLayer) -> Any:
    """Return the kernel's IRModule.

    Its parameters are x [C], position int64 [], memory [1, H, M, D] and mass [1, H, M], which are updated in place;
    the weights norm_gain and norm_bias [C], log_scale [2, H], query_key_value [2·H·U·P + H·D, C] and output [C, H·D];
    with an FFN (I > 0) its norm_gain and norm_bias [C], gate_up [2·I, C] and down [C, I]; and the result y [C].
    """
    layer = _Layer(workload, schedule)
    return IRModule({"decode_layer": _mixer_and_ffn(layer) if layer.inner else _mixer_alone(layer)})


def _mixer_alone(layer: _Layer) -> Any:
    C, H, M, D, dtype = layer.hidden, layer.heads, layer.slots, layer.value_dim, layer.dtype
    wide = layer.addresses + H * D

    @T.prim_func(s_tir=True)
    def mixer_alone(  # noqa: PLR0913 - the buffers of the kernel
        x: T.handle, position: T.handle, memory: T.handle, mass: T.handle, norm_gain: T.handle, norm_bias: T.handle,
        log_scale: T.handle, query_key_value: T.handle, output: T.handle, y: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "decode_layer", "tir.noalias": True})
        X = emit.argument(x, (C,), dtype)
        at = emit.argument(position, (), "int64")
        S = emit.argument(memory, (1, H, M, D), dtype)
        Z = emit.argument(mass, (1, H, M), dtype)
        gain = emit.argument(norm_gain, (C,), dtype)
        bias = emit.argument(norm_bias, (C,), dtype)
        alpha = emit.argument(log_scale, (2, H), dtype)
        QKV = emit.argument(query_key_value, (wide, C), dtype)
        O = emit.argument(output, (C, H * D), dtype)
        Y = emit.argument(y, (C,), dtype)
        layer.mixer(X, at, (S, Z), (gain, bias), alpha, QKV, O, Y)

    return mixer_alone


def _mixer_and_ffn(layer: _Layer) -> Any:
    C, H, M, D, dtype = layer.hidden, layer.heads, layer.slots, layer.value_dim, layer.dtype
    wide, inner = layer.addresses + H * D, layer.inner

    @T.prim_func(s_tir=True)
    def mixer_and_ffn(  # noqa: PLR0913 - the buffers of the kernel
        x: T.handle, position: T.handle, memory: T.handle, mass: T.handle, norm_gain: T.handle, norm_bias: T.handle,
        log_scale: T.handle, query_key_value: T.handle, output: T.handle, ffn_gain: T.handle, ffn_bias: T.handle,
        gate_up: T.handle, down: T.handle, y: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "decode_layer", "tir.noalias": True})
        X = emit.argument(x, (C,), dtype)
        at = emit.argument(position, (), "int64")
        S = emit.argument(memory, (1, H, M, D), dtype)
        Z = emit.argument(mass, (1, H, M), dtype)
        gain = emit.argument(norm_gain, (C,), dtype)
        bias = emit.argument(norm_bias, (C,), dtype)
        alpha = emit.argument(log_scale, (2, H), dtype)
        QKV = emit.argument(query_key_value, (wide, C), dtype)
        O = emit.argument(output, (C, H * D), dtype)
        second_gain = emit.argument(ffn_gain, (C,), dtype)
        second_bias = emit.argument(ffn_bias, (C,), dtype)
        GU = emit.argument(gate_up, (2 * inner, C), dtype)
        down_ = emit.argument(down, (C, inner), dtype)
        Y = emit.argument(y, (C,), dtype)
        layer.mixer(X, at, (S, Z), (gain, bias), alpha, QKV, O, Y)
        layer.ffn((second_gain, second_bias), GU, down_, Y)

    return mixer_and_ffn


class _Layer:
    """Emits the steps of one layer."""

    def __init__(self, workload: Workload, schedule: DecodeLayer) -> None:
        self.workload, self.schedule, self.dtype = workload, schedule, workload.dtype
        self.hidden, self.heads, self.order, self.sub_dim, self.top_k, self.slots, self.value_dim, self.inner = (
            workload.shape[axis] for axis in "CHUPKMDI"
        )
        self.addresses = 2 * self.heads * self.order * self.sub_dim

    def buffer(self, *shape: int, dtype: str | None = None) -> Any:
        return T.sblock_alloc_buffer(shape, dtype or self.dtype)

    def mixer(
        self, X: Any, position: Any, state: Pair, gain_and_bias: Pair, alpha: Any, QKV: Any, O: Any, Y: Any
    ) -> None:
        """Emit y = x + RAM(LayerNorm(x)) (paper, steps 1 to 6 and 8); ``state`` is memory and mass."""
        H, K, D = self.heads, self.top_k, self.value_dim
        normed, qkv = self.buffer(self.hidden), self.buffer(self.addresses + H * D)
        logits, slots = self.buffer(2 * H, self.order, self.sub_dim), self.buffer(2 * H, K, dtype="int32")
        weights = self.buffer(2 * H, K)
        read_slots, write_slots = (self.buffer(1, H, K, dtype="int32") for _ in range(2))
        read_weights, write_weights = (self.buffer(1, H, K) for _ in range(2))
        values, found, mixed = self.buffer(1, H, D), self.buffer(1, H, D), self.buffer(H * D)

        self.norm(X, gain_and_bias, normed)
        self.product(QKV, normed, self.hidden, lambda i: [i], lambda i, dot: emit.store(qkv, [i], dot[0]))
        with T.sblock("address"):
            self.scale(qkv, alpha, logits)
            self.decode(logits, slots, weights)
        with T.sblock("arrange"), builder.serial(0, H) as h:

            def arrange(side: int, s: Any, w: Any) -> None:
                row = side * H + h
                emit.row(s, [0, h], K, lambda k: self.shifted(slots[row, k], h, position))
                emit.row(w, [0, h], K, lambda k: weights[row, k])

            arrange(0, read_slots, read_weights)
            arrange(1, write_slots, write_weights)
            emit.row(values, [0, h], D, lambda d: qkv[self.addresses + h * D + d])
        with T.sblock("memory"):
            step = MemoryStep(tile=largest_divisor(D, 64), unroll=min(8, K), parallel=False, prefetch=0)
            with builder.serial(0, H) as h:
                accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
                later = tir.min(h + 1, H - 1)
                for slots in (write_slots, read_slots):
                    prefetch(step, K, lambda k, slots=slots: slots[0, later, k], [0, later], state)  # type: ignore[misc]
                here = [0, h]
                token(self.workload, step, Places(here, here, here), accesses, values, state, found)
                with builder.serial(0, D) as d:
                    emit.store(mixed, [h * D + d], found[0, h, d])
        self.product(O, mixed, H * D, lambda i: [i], lambda i, dot: emit.store(Y, [i], X[i] + dot[0]))

    def ffn(self, gain_and_bias: Pair, GU: Any, down: Any, Y: Any) -> None:
        """Emit y += W_down(silu(gate)·up), where gate and up are projections of LayerNorm(y)."""
        normed, active = self.buffer(self.hidden), self.buffer(self.inner)

        def activate(i: Any, dot: list[Any]) -> None:
            gate, up = dot
            small = emit.exp(-tir.abs(gate), self.dtype)  # e^-|gate|, which cannot overflow
            one = emit.constant(1, self.dtype)
            sigmoid = tir.Select(gate >= emit.constant(0, self.dtype), one, small) / (one + small)
            emit.store(active, [i], gate * sigmoid * up)

        self.norm(Y, gain_and_bias, normed)
        self.product(GU, normed, self.hidden, lambda i: [i, self.inner + i], activate, self.inner)
        self.product(down, active, self.inner, lambda i: [i], lambda i, dot: emit.store(Y, [i], Y[i] + dot[0]))

    def norm(self, X: Any, gain_and_bias: Pair, Y: Any) -> None:
        """Emit LayerNorm. The variance is the mean of squared differences from the mean."""
        gain, bias = gain_and_bias
        width, dtype = largest_divisor(self.hidden, 32), self.dtype
        size = emit.constant(self.hidden, dtype)

        def total(value: Callable[[Any], Any]) -> Any:
            emit.lanes(width, (sums, [], lambda _: emit.constant(0, dtype)))
            with builder.serial(0, self.hidden // width) as i, builder.vectorized(0, width) as lane:
                emit.store(sums, [lane], sums[lane] + value(i * width + lane))
            return emit.horizontal_sum(sums, width)

        with T.sblock("norm"):
            sums, mean, scale = self.buffer(width), self.buffer(1), self.buffer(1)
            emit.store(mean, [0], total(lambda i: X[i]) / size)
            variance = total(lambda i: (X[i] - mean[0]) * (X[i] - mean[0])) / size
            norm_eps = emit.constant(self.workload.constants["norm_eps"], dtype)
            emit.store(scale, [0], emit.constant(1, dtype) / tir.sqrt(variance + norm_eps))
            emit.row(Y, [], self.hidden, lambda i: (X[i] - mean[0]) * scale[0] * gain[i] + bias[i], 32)

    def product(
        self, W: Any, X: Any, inputs: int, rows_of: Callable[[Any], list[Any]],
        put: Callable[[Any, list[Any]], None], outputs: int | None = None,
    ) -> None:  # fmt: skip
        """Emit ``put(i, dots)`` for every output i, where dots are the products of rows ``rows_of(i)`` of W and X."""
        outputs = outputs or int(W.shape[0])
        # A divisor, so that blocks do not overlap: ``put`` may add to its output in place.
        block = largest_divisor(outputs, self.schedule.rows)
        lanes = largest_divisor(inputs, self.schedule.lanes)
        with builder.parallel(0, outputs // block) as b, T.sblock("product"):
            each = [rows_of(b * block + j) for j in range(block)]
            found = iter(dots(W, [row for rows in each for row in rows], X, inputs, lanes))
            for j, rows in enumerate(each):
                put(b * block + j, [next(found) for _ in rows])

    def scale(self, qkv: Any, alpha: Any, logits: Any) -> None:
        """Emit the scaling of the logits by e^α/τ (paper, steps 1 and 2)."""
        width, heads = self.order * self.sub_dim, self.heads
        temperature = emit.constant(self.workload.constants["temperature"], self.dtype)
        factor = self.buffer(1)
        with builder.serial(0, 2 * heads) as r:
            emit.store(factor, [0], tir.exp(alpha[r // heads, r % heads]) / temperature)
            with builder.serial(0, self.order) as u, builder.serial(0, self.sub_dim) as p:
                emit.store(logits, [r, u, p], qkv[r * width + u * self.sub_dim + p] * factor[0])

    def decode(self, logits: Any, slots: Any, weights: Any) -> None:
        rows = 2 * self.heads
        lanes = min(16, rows)
        # Loops rather than unrolled code, which would have to be fetched from memory for every layer.
        decoder = Decoder(self.workload, lanes, 0)
        first = self.buffer(1, dtype="int32")
        with builder.serial(0, (rows + lanes - 1) // lanes) as b:
            emit.store(first, [0], tir.min(b * lanes, emit.constant(rows - lanes, "int32")))
            decoder.emit(first[0], logits, slots, weights)

    def shifted(self, slot: Any, head: Any, position: Any) -> Any:
        """Return the slot after CAPE (paper, step 4): (slot − position) mod M in the first heads, computed in int64."""
        cape_heads = int(self.workload.constants["cape_heads"])
        if not cape_heads:
            return slot
        slots = emit.constant(self.slots, "int64")
        moved = tir.truncmod(slot.astype("int64") + slots - tir.truncmod(position[()], slots), slots).astype("int32")
        return moved if cape_heads == self.heads else tir.Select(head < cape_heads, moved, slot)
