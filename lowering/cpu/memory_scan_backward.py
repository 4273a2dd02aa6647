"""memory_scan_backward in TIR: recomputes the forward while saving a history, then visits the tokens in reverse.

Only the inputs of the forward are saved for the backward. The history (the row that each write replaces) is scratch
memory of one tile of channels, T·K·tile values per thread for any B·H and D, so that it stays in the caches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from ramnet.ops.accesses import Accesses
from schedules.cpu import MemoryScanBackward
from schedules.workload import Workload


def module(workload: Workload, schedule: MemoryScanBackward) -> Any:
    """Return the kernel's IRModule.

    Its parameters are grad_output [N, T, D], grad_memory [N, M, D], grad_mass [N, M], the inputs of memory_scan, and
    the outputs: gradients of write_weights, read_weights [N, T, K], values [N, T, D], memory [N, M, D] and mass [N, M].
    N and T are dynamic. The kernel raises RuntimeError (``emit.OUT_OF_RANGE``) for a slot outside 0..M-1.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype, tile = workload.dtype, schedule.tile

    @T.prim_func(s_tir=True)
    def memory_scan_backward(  # noqa: PLR0913 - the buffers of the kernel
        grad_output: T.handle, grad_memory: T.handle, grad_mass: T.handle,
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle,
        grad_write_weights: T.handle, grad_read_weights: T.handle, grad_values: T.handle,
        grad_first_memory: T.handle, grad_first_mass: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "memory_scan_backward", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        dO = emit.argument(grad_output, (N, L, D), dtype)
        dS1 = emit.argument(grad_memory, (N, M, D), dtype)
        dZ1 = emit.argument(grad_mass, (N, M), dtype)
        WS = emit.argument(write_slots, (N, L, K), "int32")
        W = emit.argument(write_weights, (N, L, K), dtype)
        RS = emit.argument(read_slots, (N, L, K), "int32")
        R = emit.argument(read_weights, (N, L, K), dtype)
        V = emit.argument(values, (N, L, D), dtype)
        S0 = emit.argument(memory, (N, M, D), dtype)
        Z0 = emit.argument(mass, (N, M), dtype)
        dW = emit.argument(grad_write_weights, (N, L, K), dtype)
        dR = emit.argument(grad_read_weights, (N, L, K), dtype)
        dV = emit.argument(grad_values, (N, L, D), dtype)
        dS = emit.argument(grad_first_memory, (N, M, D), dtype)
        dZ = emit.argument(grad_first_mass, (N, M), dtype)
        outside = T.sblock_alloc_buffer((N,), "int32")  # whether any of a head's slots is out of range
        emit.clear(outside, N)
        for n in T.parallel(N):
            with T.sblock("scan"):
                vn = T.axis.spatial(N, n)
                T.reads(
                    dO[vn, 0:L, 0:D], dS1[vn, 0:M, 0:D], dZ1[vn, 0:M], WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K],
                    RS[vn, 0:L, 0:K], R[vn, 0:L, 0:K], V[vn, 0:L, 0:D], S0[vn, 0:M, 0:D], Z0[vn, 0:M],
                )  # fmt: skip
                T.writes(
                    dW[vn, 0:L, 0:K], dR[vn, 0:L, 0:K], dV[vn, 0:L, 0:D], dS[vn, 0:M, 0:D], dZ[vn, 0:M], outside[vn]
                )
                z = T.sblock_alloc_buffer((M,), dtype)
                decays = T.sblock_alloc_buffer((L, K), dtype)
                slopes = T.sblock_alloc_buffer((L, K), dtype)
                inverses = T.sblock_alloc_buffer((L, K), dtype)  # 1 / (z + ε) at each read
                masses = T.sblock_alloc_buffer((L, K), dtype)  # z before each write
                state = T.sblock_alloc_buffer((T.int64(M), tile), dtype)
                history = T.sblock_alloc_buffer((L, K, tile), dtype)  # the row before each write
                product = T.sblock_alloc_buffer((tile,), dtype)
                factors, gradients = T.meta_var(
                    (_Factors(decays, slopes, inverses, masses), _Gradients(dW, dR, dV, dS, dZ))
                )
                tokens = T.meta_var(_Walk(workload, schedule, vn, Accesses(WS, W, RS, R), factors, gradients))
                if tokens.in_range(L):
                    for i in T.serial(M):
                        z[i] = Z0[vn, i]
                        dZ[vn, i] = dZ1[vn, i]
                    for t in T.serial(L):
                        tokens.mass_forward(t, z)
                    for q in T.serial(D // tile):
                        for i in T.serial(M):
                            for d in T.vectorized(tile):
                                state[i, d] = S0[vn, i, q * tile + d]
                                dS[vn, i, q * tile + d] = dS1[vn, i, q * tile + d]
                        for t in T.serial(L):
                            tokens.state_forward(t, q * tile, V, state, history)
                        for i in T.serial(L):
                            tokens.state_backward(L - 1 - i, q * tile, V, dO, state, history, product)
                    for i in T.serial(L):
                        tokens.mass_backward(L - 1 - i)
                else:
                    outside[vn] = 1
        emit.refuse_any(outside, N)

    return tvm.IRModule({"memory_scan_backward": memory_scan_backward})


class _Factors(NamedTuple):
    """Of one head by token and k: what the forward walk keeps for the reverse walk.

    Attributes:
        decays: (1 − w)^γ of each write. slopes: the derivative of it (paper, step 7).
        inverses: 1 / (z + ε) at each read. masses: z before each write.
    """

    decays: Any
    slopes: Any
    inverses: Any
    masses: Any


class _Gradients(NamedTuple):
    """Of the write weights, read weights, values, first memory and first mass."""

    write_weights: Any
    read_weights: Any
    values: Any
    memory: Any
    mass: Any


class _Walk:
    """Emits the forward and reverse passes over the tokens of head ``n``."""

    def __init__(
        self, workload: Workload, schedule: MemoryScanBackward, n: Any, accesses: Accesses, factors: _Factors,
        gradients: _Gradients,
    ) -> None:  # fmt: skip
        self.workload, self.unroll, self.tile, self.n = workload, schedule.unroll, schedule.tile, n
        self.accesses, self.factors, self.gradients = accesses, factors, gradients
        self.top_k = workload.shape["K"]

    def in_range(self, tokens: Any) -> Any:
        """Return whether the slots of the first ``tokens`` tokens are in 0..M-1."""
        slots = (self.accesses.write_slots, self.accesses.read_slots)
        return emit.slots_in_range(slots, tokens, self.top_k, self.workload.shape["M"], lambda t: [self.n, t])

    def mass_forward(self, t: Any, z: Any) -> None:
        """Emit token t of the forward in the mass z, saving the factors, and set the weights' gradients to 0."""
        (WS, W, RS, _), (decays, slopes, inverses, masses), n = self.accesses, self.factors, self.n
        dW, dR = self.gradients.write_weights, self.gradients.read_weights
        dtype, constants = self.workload.dtype, self.workload.constants
        zero = emit.constant(0.0, dtype)

        def write(k: Any) -> None:
            slot, weight = WS[n, t, k], W[n, t, k]
            emit.store(decays, [t, k], emit.decay(weight, constants["decay_power"], dtype))
            slope = emit.decay_slope(weight, constants["decay_power"], constants["proxy_eps"], dtype)
            emit.store(slopes, [t, k], slope)
            emit.store(masses, [t, k], z[slot])
            emit.store(z, [slot], decays[t, k] * masses[t, k] + weight)
            emit.store(dW, [n, t, k], zero)

        def read(k: Any) -> None:
            total = z[RS[n, t, k]] + emit.constant(constants["eps"], dtype)
            emit.store(inverses, [t, k], emit.constant(1.0, dtype) / total)
            emit.store(dR, [n, t, k], zero)

        emit.each_slot(self.top_k, self.unroll, write)
        emit.each_slot(self.top_k, self.unroll, read)

    def state_forward(self, t: Any, start: Any, V: Any, state: Any, history: Any) -> None:
        """Emit token t of the forward on the tile of channels from ``start``: save each row, then write it."""
        WS, W, decays, n = self.accesses.write_slots, self.accesses.write_weights, self.factors.decays, self.n

        def write(k: Any) -> None:
            slot = WS[n, t, k]
            with builder.vectorized(0, self.tile) as lane:
                emit.store(history, [t, k, lane], state[slot, lane])
                emit.store(state, [slot, lane], decays[t, k] * history[t, k, lane] + W[n, t, k] * V[n, t, start + lane])

        emit.each_slot(self.top_k, self.unroll, write)

    def state_backward(self, t: Any, start: Any, V: Any, dO: Any, state: Any, history: Any, product: Any) -> None:
        """Emit token t of the backward on the tile of channels from ``start``, adding its dot products to dW and dR."""
        (WS, W, RS, R), (decays, slopes, inverses, _), n = self.accesses, self.factors, self.n
        (dW, dR, dV, dS, _), tile = self.gradients, self.tile

        def read(k: Any) -> None:
            slot = RS[n, t, k]
            emit.lanes(tile, (product, [], lambda lane: state[slot, lane] * dO[n, t, start + lane]))
            emit.store(dR, [n, t, k], dR[n, t, k] + emit.horizontal_sum(product, tile))
            factor = R[n, t, k] * inverses[t, k]
            emit.tiles(dS, [n, slot], start, tile, lambda d: dS[n, slot, d] + factor * dO[n, t, d])

        def write(k: Any) -> None:
            slot = WS[n, t, k]
            # The weight's gradient is dS·v from the write plus slope·(dS·row) from the decay, in one dot product.
            emit.lanes(
                tile,
                (product, [], lambda lane: dS[n, slot, start + lane]
                    * (V[n, t, start + lane] + slopes[t, k] * history[t, k, lane])),
            )  # fmt: skip
            emit.store(dW, [n, t, k], dW[n, t, k] + emit.horizontal_sum(product, tile))
            emit.tiles(dS, [n, slot], start, tile, lambda d: decays[t, k] * dS[n, slot, d])
            emit.lanes(tile, (state, [slot], lambda lane: history[t, k, lane]))

        emit.each_slot(self.top_k, self.unroll, read)
        emit.sum_slots(
            self.top_k,
            self.unroll,
            lambda k: lambda d: W[n, t, k] * dS[n, WS[n, t, k], d],
            lambda value: emit.tiles(dV, [n, t], start, tile, value),
            lambda d: dV[n, t, d],
        )
        emit.each_slot(self.top_k, self.unroll, write)

    def mass_backward(self, t: Any) -> None:
        """Emit token t of the backward in the mass: complete the weights' gradients from the dot products."""
        (WS, _, RS, R), (decays, slopes, inverses, masses), n = self.accesses, self.factors, self.n
        dW, dR, dZ = self.gradients.write_weights, self.gradients.read_weights, self.gradients.mass

        def read(k: Any) -> None:
            slot = RS[n, t, k]
            emit.store(dR, [n, t, k], dR[n, t, k] * inverses[t, k])
            emit.store(dZ, [n, slot], dZ[n, slot] - dR[n, t, k] * R[n, t, k] * inverses[t, k])

        def write(k: Any) -> None:
            slot = WS[n, t, k]
            through_mass = emit.constant(1.0, self.workload.dtype) + slopes[t, k] * masses[t, k]
            emit.store(dW, [n, t, k], dW[n, t, k] + dZ[n, slot] * through_mass)
            emit.store(dZ, [n, slot], decays[t, k] * dZ[n, slot])

        emit.each_slot(self.top_k, self.unroll, read)
        emit.each_slot(self.top_k, self.unroll, write)
