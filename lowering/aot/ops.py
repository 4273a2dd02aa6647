"""The memory ops as TIR functions of pointers, for other runtimes. None has a parallel loop: a runtime divides their
work among its own threads.

Their schedules are those of the records, less the knobs that are about threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tvm.tirx as tir
from tvm.ir import IRModule
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering.aot.function import Buffer, Parameters, function
from lowering.aot.machines import Machine
from lowering.aot.matrix import Tiling
from lowering.aot.schedules import schedules_of
from lowering.cpu.address_decode import Decoder
from lowering.cpu.memory_scan import _Chunk
from lowering.cpu.memory_step import Places, prefetch, token
from ramnet.config import RamLayerConfig
from ramnet.ops.accesses import Accesses
from schedules.cpu import AddressDecode
from schedules.cpu.lanes import REGISTER_BYTES
from schedules.of_model import of_layer

_F32 = "float32"
_ANY = 2**31 - 1  # the declared length of an axis whose length the caller knows


class Ops:
    """The ops of one layer.

    Args:
        index: which kind of layer it is. The names of the functions end in it.

    Attributes:
        lanes: the least number of rows that ``address_decode_many`` takes.
        scratch: the number of floats in each of the scan's two scratch arrays.
    """

    def __init__(self, config: RamLayerConfig, machine: Machine, index: int = 0) -> None:
        self.machine, self.index, self.rows = machine, index, 2 * config.num_heads
        self.K, self.M, self.D = config.top_k, config.slots, config.value_dim
        self.U, self.P = config.order, config.sub_dim
        self.workloads = {workload.op: workload for workload in of_layer(config)}
        self.few, self.many, self.step, self.scan = schedules_of(config, machine)
        self.lanes, self.scratch = self._lanes(self.many), self.scan.chunk * self.K

    def functions(self) -> list[Any]:
        """Return functions of pointers to arrays, which are contiguous unless strides are given. Without their prefix
        and index, they are:

        - ``address_decode`` of rows int64, logits [rows, U, P], and the outputs slots int32 [rows, K] and
          weights [rows, K]. There are at least 2·H rows, those of a token.
        - ``address_decode_many``, the same for at least ``lanes`` rows, unrolled.
        - ``memory_scan``, of one head: tokens int64, the number of elements from a token to the next in
          accesses, values and output, int64 each, write_slots and write_weights, read_slots and read_weights
          [tokens, K], values [tokens, D], memory [M, D] and mass [M], which are updated in place, the output
          [tokens, D], and two arrays of ``scratch`` floats.
        - ``memory_step``, of one token: heads int64, accesses [heads, K], values [heads, D], memory
          [heads, M, D] and mass [heads, M], which are updated in place, and the output [heads, D].

        Slots must be in 0..M-1; they are not checked.
        """
        few, many = min(self.rows, self._lanes(self.few)), self.lanes
        return [
            self._decode("address_decode", few, self.few.unroll),
            self._decode("address_decode_many", many, self.many.unroll),
            self._scan(),
            self._step(),
        ]

    def _lanes(self, schedule: AddressDecode) -> int:
        """Return the rows in a vector: fewer than tuned where a list of scores would need a workspace."""
        if schedule.unroll:
            return schedule.lanes
        longest = max(1 << (self.K - 1).bit_length(), self.P)
        return min(schedule.lanes, (REGISTER_BYTES - 1) // (4 * longest))

    def _decode(self, name: str, lanes: int, unroll: int) -> Any:
        def body(p: Any) -> None:
            with builder.serial(0, (p.rows + lanes - 1) // lanes) as b, T.sblock("decode"):
                decoder = Decoder(self.workloads["address_decode"], lanes, unroll)
                decoder.emit(tir.min(b * lanes, p.rows - lanes), p.logits, p.slots, p.weights)

        return self._function(name, body, {
            "rows": "int64", "logits": Buffer((_ANY, self.U, self.P)), "slots": Buffer((_ANY, self.K), "int32"),
            "weights": Buffer((_ANY, self.K)),
        })  # fmt: skip

    def _scan(self) -> Any:
        schedule = self.scan

        def body(p: Any) -> None:
            accesses = Accesses(*(_strided(p, name, p.access_stride) for name in Accesses._fields))
            values, output = _strided(p, "values", p.value_stride), _strided(p, "output", p.output_stride)
            with builder.serial(0, (p.tokens + schedule.chunk - 1) // schedule.chunk) as c, T.sblock("chunk"):
                chunk = _Chunk(self.workloads["memory_scan"], schedule, 0, c, p.tokens)
                chunk.mass(accesses, p.mass, p.decays, p.factors)
                with builder.serial(0, self.D // schedule.tile) as q:
                    chunk.tile(q * schedule.tile, accesses, values, p.decays, p.factors, p.memory, output)

        values, scratch = Buffer((_ANY, self.D)), Buffer((schedule.chunk, self.K))
        return self._function("memory_scan", body, {
            "tokens": "int64", "access_stride": "int64", "value_stride": "int64", "output_stride": "int64",
            **self._accesses(), "values": values, "memory": Buffer((1, self.M, self.D)), "mass": Buffer((self.M,)),
            "output": values, "decays": scratch, "factors": scratch,
        })  # fmt: skip

    def _step(self) -> Any:
        schedule, workload = self.step, self.workloads["memory_step"]

        def body(p: Any) -> None:
            accesses = Accesses(p.write_slots, p.write_weights, p.read_slots, p.read_weights)
            state = p.memory, p.mass
            with builder.serial(0, p.heads) as n, T.sblock("head"):
                if schedule.prefetch:
                    later = tir.min(n + schedule.prefetch, p.heads - 1)
                    for slots in (p.write_slots, p.read_slots):
                        prefetch(schedule, self.K, lambda k, slots=slots: slots[later, k], [later], state)  # type: ignore[misc]
                token(workload, schedule, Places([n], [n], [n]), accesses, p.values, state, p.output)

        values = Buffer((_ANY, self.D))
        return self._function("memory_step", body, {
            "heads": "int64", **self._accesses(), "values": values, "memory": Buffer((_ANY, self.M, self.D)),
            "mass": Buffer((_ANY, self.M)), "output": values,
        })  # fmt: skip

    def _accesses(self) -> Parameters:
        slots, weights = Buffer((_ANY, self.K), "int32"), Buffer((_ANY, self.K))
        return {"write_slots": slots, "write_weights": weights, "read_slots": slots, "read_weights": weights}

    def _function(self, name: str, body: Callable[[Any], None], parameters: Parameters) -> Any:
        return function(f"{name}_{self.index}", parameters, (self.machine, Tiling()), body)


def module(kinds: Iterable[Ops]) -> IRModule:
    """Return the functions of all kinds of layers."""
    return IRModule({str(each.attrs["global_symbol"]): each for kind in kinds for each in kind.functions()})


def _strided(p: Any, name: str, stride: Any) -> Any:
    """Return a parameter [tokens, width] as a buffer [1, tokens, width] with ``stride`` elements between tokens."""
    buffer = getattr(p, name)
    sizes = [T.int64(size) for size in (1, *buffer.shape)]
    strides = [T.int64(0), stride, T.int64(1)]
    return builder.decl_buffer(sizes, buffer.dtype, data=buffer.data, strides=strides, align=4)
