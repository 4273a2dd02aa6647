"""The processors that a token is compiled for, and their integer dot products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm.tirx as tir


@dataclass(frozen=True)
class Dot:
    """An instruction that adds products of int8 to int32 sums.

    Attributes:
        intrinsic: LLVM's name by the number of products in one instruction; empty to multiply in int32.
        offset: what is added to activations, which the instruction takes as unsigned numbers.
    """

    intrinsic: dict[int, str] = field(default_factory=dict)
    offset: int = 0

    def width(self, inputs: int) -> int:
        """Return how many products of a row are added at a time."""
        return next((width for width in sorted(self.intrinsic, reverse=True) if inputs % width == 0), 16)

    def lanes(self, width: int) -> int:
        """Return the number of partial sums for ``width`` products."""
        return width // 4 if self.intrinsic else width

    def accumulate(self, total: Any, activations: Any, weights: Any, width: int) -> Any:
        """Return the partial sums plus the products of vectors of ``width`` int8 each."""
        if self.intrinsic:
            name = self.intrinsic[width]
            return tir.call_llvm_pure_intrin(f"int32x{width // 4}", name, total, activations, weights)
        wide = f"int16x{width}"
        # Products of int8 fit int16, whose widening addition processors without a dot product have.
        return total + (activations.astype(wide) * weights.astype(wide)).astype(f"int32x{width}")


class _WasmDot(Dot):
    """WebAssembly's i32x4.dot_i16x8_s, whose operands are widened as they are loaded."""

    def width(self, inputs: int) -> int:
        return 8

    def lanes(self, width: int) -> int:
        return 4

    def accumulate(self, total: Any, activations: Any, weights: Any, width: int) -> Any:
        wide = [x.astype("int16x8") for x in (activations, weights)]
        return total + tir.call_llvm_pure_intrin("int32x4", "llvm.wasm.dot", *wide)


_VNNI = Dot({64: "llvm.x86.avx512.vpdpbusd.512", 32: "llvm.x86.avx512.vpdpbusd.256"}, offset=128)
_SDOT = Dot({16: "llvm.aarch64.neon.sdot.v4i32.v16i8"})


@dataclass(frozen=True)
class Machine:
    """A processor to compile for.

    Attributes:
        name: what users type.
        llvm: LLVM's options, as in TVM's target.
        dot: the integer dot product.
        lanes: partial sums of a dot product of floating numbers, if other than a format's own.
    """

    name: str
    llvm: dict[str, Any]
    dot: Dot
    lanes: int | None = None


# Each is what a program can be shipped for. x86-64-v3 and v4 are levels of the x86-64 psABI: AVX2, and AVX-512 without
# VNNI. The Cortex-A72 has no dot product; the A76 and the Neoverse N1 do.
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("x86-64-v3", {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}, Dot()),
        Machine("x86-64-v4", {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"}, Dot()),
        Machine("rpi4", {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, Dot()),
        Machine("rpi5", {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, _SDOT),
        Machine("graviton", {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"}, _SDOT),
    )
}

# All browsers since 2023 have vectors of 128 bits. Not all have relaxed ones, which could add four products at once.
# On x86 they are kept in 16 registers: a token of "tiny" takes 67 µs with 4 lanes, and 116 with 16.
WASM = Machine(
    "wasm",
    {"kind": "llvm", "mtriple": "wasm32-unknown-unknown", "mattr": ["+simd128"], "vector-width": 128},
    _WasmDot(),
    lanes=4,
)


def host() -> Machine:
    """Return this machine."""
    from lowering.cpu.build import processor
    from lowering.targets import cpu_features

    features = cpu_features()
    dot = _VNNI if {"avx512_vnni", "avx512vl"} <= features else _SDOT if "asimddp" in features else Dot()
    return Machine("cpu", {"kind": "llvm", "mcpu": processor()}, dot)
