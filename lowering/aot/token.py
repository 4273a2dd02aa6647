"""The TIR functions of a token. The C library in ``runtime/`` calls them in turn, for one token or a block of tokens.

Tokens of a block share each read of the weights. They may be of one sequence or of several; only ``memory`` and
``convolve`` tell them apart. n is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.ir import IRModule
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.aot.function import FORMATS, Buffer, Parameters, Weight, function, rows, vector
from lowering.aot.machines import Machine
from lowering.aot.matrix import Tiling
from lowering.aot.parts import norm, product
from lowering.aot.weights import LONGEST_BLOCK, SCALED, of_model, precision_of, read_by_token
from lowering.cpu.address_decode import Decoder
from lowering.cpu.memory_step import Places, prefetch, token
from ramnet.config import RamLayerConfig, RamNetConfig
from ramnet.ops.accesses import Accesses
from schedules.base import largest_divisor
from schedules.cpu import MemoryStep
from schedules.cpu.lanes import REGISTER_BYTES
from schedules.workload import Workload

_F32 = "float32"


# The bytes from which on weights do not stay in a cache from one token to the next.
STREAMED = 8 << 20


def default_tiling(config: RamNetConfig, precision: str, machine: Machine) -> Tiling:
    """Return the loops of a model's products, unless a search has found better ones.

    Floating numbers that do not stay in a cache are read one row after the other, as they lie in memory. On a Zen 4,
    where neighbours that take turns and are prefetched as on an Intel processor take longer, a token of "340m" on two
    threads takes 1.09 times the time of reading its weights in float32 (in turn: 1.42) and 1.17 in bfloat16 (1.90).
    Four rows that are far apart take 1.03 times as long as one in float32, but 0.97 in int8 and 0.91 in int4, and on
    one thread 0.83 and 0.71.
    """
    usual = FORMATS[precision].usual(machine)
    if machine.rows_in_turn or precision in SCALED or read_by_token(config, precision) < STREAMED:
        return usual
    return usual._replace(rows=1, lanes=32 if machine.lanes is None else usual.lanes)


def module(config: RamNetConfig, precision: str, machine: Machine, tiling: Tiling | None = None) -> IRModule:
    """Return the functions of a model whose matrices are stored as ``precision``.

    ``tiling`` None takes ``default_tiling``.
    """
    kernels = _Kernels(config, precision, machine, tiling or default_tiling(config, precision, machine))
    functions = [kernels.embed(), kernels.head()]
    for i, layer in enumerate(config.kinds):
        functions += [kernels.address(layer, i), kernels.memory(layer, i), kernels.mix(layer, i)]
    if config.intermediate_size:
        functions.append(kernels.feed_forward())
    if config.conv_layers:
        functions += [kernels.gate(), kernels.convolve()]
    return IRModule({str(each.attrs["global_symbol"]): each for each in functions})


class _Kernels:
    """Emits the functions."""

    def __init__(self, config: RamNetConfig, precision: str, machine: Machine, tiling: Tiling) -> None:
        self.c = config
        self.precision, self.machine, self.tiling = precision, machine, tiling

    def function(self, name: str, parameters: Parameters, body: Callable[[Any], None]) -> Any:
        return function(name, parameters, (self.machine, self.tiling), body)

    def weight(self, outputs: int, inputs: int) -> Weight:
        return Weight(outputs, inputs, self.precision)

    def table(self, which: int) -> Weight:
        """Return the parameter of the embedding, the first of the model's weights, or of the head, the last."""
        return Weight(self.c.vocab_size, self.c.hidden_size, precision_of(of_model(self.c)[which], self.precision))

    def norm(self) -> Parameters:
        """Return the parameters of a LayerNorm."""
        return {"gain": vector(self.c.hidden_size), "bias": vector(self.c.hidden_size)}

    def embed(self) -> Any:
        """Look up embeddings: x[t] = E[ids[t]]."""
        C = self.c.hidden_size

        def body(p: Any) -> None:
            with builder.serial(0, p.n) as t:
                emit.row(p.x, [t], C, lambda i: p.table.value(p.ids[t], i), 16)

        parameters: Parameters = {"n": "int32", "ids": Buffer((LONGEST_BLOCK,), "int32"), "table": self.table(0)}
        return self.function("embed", {**parameters, "x": rows(C)}, body)

    def gate(self) -> Any:
        """Compute h = LayerNorm(x) and g = W h + b of a convolution block."""
        C = self.c.hidden_size

        def body(p: Any) -> None:
            norm(p.n, p.x, (p.gain, p.bias), p.h, self.c.norm_eps)

            def put(t: Any, i: Any, dot: Any) -> None:
                emit.store(p.g, [t, i], dot + p.gate_bias[i])

            product(p.gate, p.h, p, put)

        parameters: Parameters = {
            "n": "int32",
            "x": rows(C),
            **self.norm(),
            "gate": self.weight(C, C),
            "gate_bias": vector(C),
        }
        return self.function("gate", {**parameters, "h": rows(C), "g": rows(C)}, body)

    def convolve(self) -> Any:
        """Compute x += h + conv(h) · g for tokens of one sequence, whose last inputs are ``recent``."""
        C, taps = self.c.hidden_size, self.c.conv_kernel
        kept, width = taps - 1, largest_divisor(C, 16)

        def body(p: Any) -> None:
            def seen(at: Any, i: Any) -> Any:
                """Return the input of token ``at``, which is before the block if negative."""
                if kept == 0:
                    return p.h[at, i]
                before = p.recent[tir.max(tir.min(at + kept, kept - 1), 0), i]
                return tir.if_then_else(at < 0, before, p.h[tir.max(at, 0), i])

            def channels(at: Any, write: Callable[[Any, Any], None]) -> None:
                with builder.serial(0, C // width) as block, builder.vectorized(0, width) as lane:
                    write(at, block * width + lane)

            def mix(t: Any, i: Any) -> None:
                conv = sum((p.taps[k, i] * seen(t - kept + k, i) for k in range(taps)), start=emit.constant(0, _F32))
                emit.store(p.x, [t, i], p.x[t, i] + p.h[t, i] + conv * p.g[t, i])

            with builder.serial(0, p.n) as t:
                channels(t, mix)
            for k in range(kept):  # in order, as a block may be shorter than the convolution
                channels(k, lambda k, i: emit.store(p.recent, [k, i], seen(p.n - kept + k, i)))

        parameters: Parameters = {"n": "int32", "h": rows(C), "g": rows(C), "taps": Buffer((taps, C))}
        return self.function("convolve", {**parameters, "recent": Buffer((max(kept, 1), C)), "x": rows(C)}, body)

    def address(self, c: RamLayerConfig, kind: int) -> Any:
        """Compute slots and weights of reads and writes, before CAPE, and the values (paper, steps 1 to 3)."""
        C, H, K, U, P = c.hidden_size, c.num_heads, c.top_k, c.order, c.sub_dim
        addresses, values = 2 * H * U * P, H * c.value_dim
        workload = Workload.of("address_decode", (2 * H, U, P, K), _F32, {})
        # Fewer lanes where a list of scores would not stay on the stack.
        lanes = min(16, 2 * H, (REGISTER_BYTES - 1) // (4 * max(1 << (K - 1).bit_length(), P)))

        def body(p: Any) -> None:
            norm(p.n, p.x, (p.gain, p.bias), p.normed, self.c.norm_eps)
            with builder.serial(0, 2 * H) as r:
                emit.store(p.factors, [r], tir.exp(p.alpha[r]) / emit.constant(c.temperature, _F32))

            def put(t: Any, i: Any, dot: Any) -> None:
                with builder.If(i < addresses):
                    with builder.Then():
                        r = i // (U * P)
                        logit = dot + p.address_bias[i] if c.address_bias else dot
                        emit.store(p.logits, [t * (2 * H) + r, i // P % U, i % P], logit * p.factors[r])
                    with builder.Else():
                        emit.store(p.values, [t, i - addresses], dot)

            product(p.project, p.normed, p, put)
            count = p.n * (2 * H)
            with builder.parallel(0, (count + lanes - 1) // lanes) as b, T.sblock("decode"):
                # Loops rather than unrolled code, which would have to be fetched from memory for every layer.
                first = tir.min(b * lanes, count - lanes)
                Decoder(workload, lanes, 0).emit(first, p.logits, p.slots, p.weights)

        every = LONGEST_BLOCK * 2 * H
        bias: Parameters = {"address_bias": vector(addresses)} if c.address_bias else {}
        parameters: Parameters = {
            "n": "int32", "x": rows(C), **self.norm(), "alpha": vector(2 * H), **bias,
            "project": self.weight(addresses + values, C), "slots": Buffer((every, K), "int32"),
            "weights": Buffer((every, K)), "values": rows(values), "normed": rows(C),
            "logits": Buffer((every, U, P)), "factors": vector(2 * H),
        }  # fmt: skip
        return self.function(f"address_{kind}", parameters, body)

    def memory(self, c: RamLayerConfig, kind: int) -> Any:
        """Write and read the memory (paper, steps 4 to 6) for tokens of one sequence, the first at ``position``.

        Heads are parallel. Each writes and reads its tokens in turn.
        """
        H, K, M, D = c.num_heads, c.top_k, c.slots, c.value_dim
        workload = Workload.of("memory_step", (1, K, M, D), _F32, {"decay_power": c.decay_power, "eps": c.eps})
        step = MemoryStep(tile=largest_divisor(D, 64), unroll=min(8, K), parallel=False, prefetch=0)

        def body(p: Any) -> None:
            def shifted(t: Any, side: int, h: Any, k: Any) -> Any:
                """Return a slot after CAPE: (slot − position) mod M in the first heads, computed in int64."""
                slot, size = p.slots[t, side, h, k], emit.constant(M, "int64")
                at = tir.truncmod(p.position + t.astype("int64"), size)
                moved = tir.truncmod(slot.astype("int64") + size - at, size)
                return tir.Select(h < p.cape_heads, moved.astype("int32"), slot)

            state = p.memory, p.mass
            with builder.parallel(0, H) as h, T.sblock("head"), builder.serial(0, p.n) as t:
                with builder.If(p.n == 1), builder.Then():
                    later = tir.min(h + 1, H - 1)
                    for side in range(2):
                        prefetch(step, K, lambda k, side=side: shifted(t, side, later, k), [later], state)  # type: ignore[misc]
                slots = [T.sblock_alloc_buffer((1, K), "int32") for _ in range(2)]
                weights = [T.sblock_alloc_buffer((1, K), _F32) for _ in range(2)]
                for side in range(2):
                    emit.row(slots[side], [0], K, lambda k, side=side: shifted(t, side, h, k))  # type: ignore[misc]
                    emit.row(weights[side], [0], K, lambda k, side=side: p.weights[t, side, h, k])  # type: ignore[misc]
                accesses = Accesses(slots[1], weights[1], slots[0], weights[0])
                token(workload, step, Places([0], [t, h], [h]), accesses, p.values, state, p.mixed)

        parameters: Parameters = {
            "n": "int32", "position": "int64", "cape_heads": "int32",
            "slots": Buffer((LONGEST_BLOCK, 2, H, K), "int32"), "weights": Buffer((LONGEST_BLOCK, 2, H, K)),
            "values": Buffer((LONGEST_BLOCK, H, D)), "memory": Buffer((H, M, D)), "mass": Buffer((H, M)),
            "mixed": Buffer((LONGEST_BLOCK, H, D)),
        }  # fmt: skip
        return self.function(f"memory_{kind}", parameters, body)

    def mix(self, c: RamLayerConfig, kind: int) -> Any:
        """Compute x += W_o · mixed (paper, step 8)."""
        C, values = c.hidden_size, c.num_heads * c.value_dim
        parameters: Parameters = {
            "n": "int32",
            "mixed": rows(values),
            "output": self.weight(C, values),
            "x": rows(C),
        }
        return self.function(f"mix_{kind}", parameters, lambda p: product(p.output, p.mixed, p, _add_to(p.x)))

    def feed_forward(self) -> Any:
        """Compute x += W_down(silu(gate) · up), where gate and up are projections of LayerNorm(x)."""
        C, inner = self.c.hidden_size, self.c.intermediate_size

        def body(p: Any) -> None:
            def silu(gate: Any) -> Any:
                small = emit.exp(-tir.abs(gate), _F32)  # e^-|gate|, which cannot overflow
                one = emit.constant(1, _F32)
                return gate * (tir.Select(gate >= emit.constant(0, _F32), one, small) / (one + small))

            norm(p.n, p.x, (p.gain, p.bias), p.normed, self.c.norm_eps)
            product(p.gate_up, p.normed, p, lambda t, i, dot: emit.store(p.active, [t, i], dot))
            with builder.serial(0, p.n) as t:  # in vectors, which is why it is not a part of the product
                emit.row(p.active, [t], inner, lambda i: silu(p.active[t, i]) * p.active[t, inner + i], 16)
            product(p.down, p.active, p, _add_to(p.x))

        parameters: Parameters = {
            "n": "int32", "x": rows(C), **self.norm(), "gate_up": self.weight(2 * inner, C),
            "down": self.weight(C, inner), "normed": rows(C), "active": rows(2 * inner),
        }  # fmt: skip
        return self.function("feed_forward", parameters, body)

    def head(self) -> Any:
        """Compute the logits of LayerNorm(x)."""
        C, V = self.c.hidden_size, self.c.vocab_size

        def body(p: Any) -> None:
            norm(p.n, p.x, (p.gain, p.bias), p.normed, self.c.norm_eps)
            product(p.table, p.normed, p, lambda t, i, dot: emit.store(p.logits, [t, i], dot))

        parameters: Parameters = {"n": "int32", "x": rows(C), **self.norm(), "table": self.table(-1), "logits": rows(V)}
        return self.function("head", {**parameters, "normed": rows(C)}, body)


def _add_to(X: Any) -> Callable[[Any, Any, list[Any]], None]:
    return lambda t, i, dot: emit.store(X, [t, i], X[t, i] + dot)
