"""The processors that a token is compiled for, and their integer dot products."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any, ClassVar

import tvm.tirx as tir


@dataclass(frozen=True)
class Dot:
    """An instruction that adds products of int8 to int32 sums.

    Attributes:
        intrinsic: LLVM's name by the number of products in one instruction; empty to widen and multiply.
        offset: what is added to activations, which the instruction takes as unsigned numbers.
        matrix: LLVM's name of an instruction that adds the products of two rows of 8 with two others to 2 × 2 sums.
    """

    intrinsic: dict[int, str] = field(default_factory=dict)
    offset: int = 0
    matrix: str = ""

    def width(self, inputs: int) -> int:
        """Return how many products of a row are added at a time."""
        return next((width for width in sorted(self.intrinsic, reverse=True) if inputs % width == 0), 16)

    def lanes(self, width: int) -> int:
        """Return the number of partial sums for ``width`` products, each of which has four of them."""
        return width // 4

    def accumulate(self, total: Any, activations: Any, weights: Any, width: int) -> Any:
        """Return the partial sums plus the products of vectors of ``width`` int8 each.

        The first are read as unsigned if there is an ``offset``.
        """
        if self.intrinsic:
            name = self.intrinsic[width]
            return tir.call_llvm_pure_intrin(f"int32x{width // 4}", name, total, activations, weights)
        wide = f"int16x{width}"
        products = activations.astype(wide) * weights.astype(wide)
        # The sum of two products of int8 fits int16: at most 2 · 128 · 127.
        pairs = (_half(products, width, 0) + _half(products, width, 1)).astype(f"int32x{width // 2}")
        return total + _half(pairs, width // 2, 0) + _half(pairs, width // 2, 1)

    def accumulate_int4(self, total: Any, weights: Any, activations: Any, width: int) -> Any:
        """Do the same for weights that are at least 0."""
        return self.accumulate(total, weights, activations, width)


def _half(vector: Any, width: int, which: int) -> Any:
    """Return the first (0) or the last half of a vector."""
    return tir.Shuffle([vector], list(range(which * width // 2, (which + 1) * width // 2)))


class _Avx2Dot(Dot):
    """vpmaddubsw, which multiplies unsigned with signed numbers and saturates sums of two products to int16.

    Magnitudes of at most 127 do not saturate; the sign of the first is moved to the second.
    """

    _NAMES: ClassVar = {
        32: ("avx2.psign.b", "avx2.pmadd.ub.sw", "avx2.pmadd.wd"),
        16: ("ssse3.psign.b.128", "ssse3.pmadd.ub.sw.128", "sse2.pmadd.wd"),
    }

    def width(self, inputs: int) -> int:
        return 16 if inputs % 32 else 32

    def accumulate(self, total: Any, activations: Any, weights: Any, width: int) -> Any:
        signed = self._call(0, width, "int8", weights, activations)
        return self.accumulate_int4(total, tir.abs(activations), signed, width)

    def accumulate_int4(self, total: Any, weights: Any, activations: Any, width: int) -> Any:
        pairs = self._call(1, width, "int16", weights, activations)
        ones = tir.Broadcast(tir.const(1, "int16"), width // 2)
        return total + self._call(2, width, "int32", pairs, ones)

    def _call(self, which: int, width: int, dtype: str, *operands: Any) -> Any:
        name = f"llvm.x86.{self._NAMES[width][which]}"
        return tir.call_llvm_pure_intrin(f"{dtype}x{width // (1, 2, 4)[which]}", name, *operands)


class _WasmDot(Dot):
    """WebAssembly's i32x4.dot_i16x8_s, whose operands are widened as they are loaded."""

    def width(self, inputs: int) -> int:
        return 16

    def lanes(self, width: int) -> int:
        return 4

    def accumulate(self, total: Any, activations: Any, weights: Any, width: int) -> Any:
        wide = [x.astype(f"int16x{width}") for x in (activations, weights)]
        for which in range(2):
            halves = [_half(x, width, which) for x in wide]
            total = total + tir.call_llvm_pure_intrin("int32x4", "llvm.wasm.dot", *halves)
        return total


_VNNI = Dot({width: f"llvm.x86.avx512.vpdpbusd.{width * 8}" for width in (64, 32, 16)}, offset=128)
_AVX2 = _Avx2Dot()
_SDOT = Dot({16: "llvm.aarch64.neon.sdot.v4i32.v16i8"})
_I8MM = Dot(_SDOT.intrinsic, matrix="llvm.aarch64.neon.smmla.v4i32.v16i8")


@dataclass(frozen=True, eq=False)
class Machine:
    """A processor to compile for.

    Attributes:
        name: what users type.
        llvm: LLVM's options, as in TVM's target.
        dot: the integer dot product.
        lanes: partial sums of a dot product of floating numbers, if other than a format's own.
        needs: what its code may use and processors of the architecture may lack, as Linux calls it.
        rows_in_turn: whether a token's loop reads neighbouring rows in turn, with prefetches, and not rows that are far
            apart, each as it lies in memory.
        device: the name that records of it bear; empty if it is not this machine's processor.
    """

    name: str
    llvm: dict[str, Any]
    dot: Dot
    lanes: int | None = None
    needs: tuple[str, ...] = ()
    rows_in_turn: bool = False
    device: str = ""

    @property
    def symbol(self) -> str:
        """The name in symbols of C."""
        return self.name.replace("-", "_")


def _machine(name: str, triple: str, llvm: dict[str, Any], dot: Dot, needs: tuple[str, ...]) -> Machine:
    return Machine(name, {"kind": "llvm", "mtriple": f"{triple}-linux-gnu", **llvm}, dot, needs=needs)


# All processors with these have the rest of x86-64-v3, or v4, too.
_V3 = ("avx2", "bmi2", "fma")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_V8_2 = ("atomics", "asimdrdm", "asimdhp", "asimddp")
_V1 = (*_V8_2, "i8mm", "bf16", "sve")

# Each is what a program can be shipped for. x86-64-v3 and v4 are levels of the x86-64 psABI: AVX2, and AVX-512 without
# VNNI. The Cortex-A72 has no dot product; the A76 and the Neoverse N1 do, and the V1 of Graviton 3 has i8mm too.
MACHINES = {
    machine.name: machine
    for machine in (
        _machine("x86-64-v3", "x86_64", {"mcpu": "x86-64-v3"}, _AVX2, _V3),
        _machine("x86-64-v4", "x86_64", {"mcpu": "x86-64-v4"}, _AVX2, _V4),
        _machine("rpi4", "aarch64", {"mcpu": "cortex-a72"}, Dot(), ()),
        _machine("rpi5", "aarch64", {"mcpu": "cortex-a76"}, _SDOT, _V8_2),
        _machine("graviton", "aarch64", {"mcpu": "neoverse-n1"}, _SDOT, _V8_2),
        _machine("graviton3", "aarch64", {"mcpu": "neoverse-v1"}, _I8MM, _V1),
    )
}

# What users can name: a machine, or several, the best first, of which a library takes the first that it can run on.
# With VNNI besides, a token of "tiny" in int8 takes 5 % longer, and a token of a prompt 7 %.
TARGETS = {
    **{name: (machine,) for name, machine in MACHINES.items()},
    "x86-64": (MACHINES["x86-64-v4"], MACHINES["x86-64-v3"]),
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
    from lowering.targets import cpu_features, cpu_name, cpu_vendor

    features = cpu_features()
    known = {"avx512_vnni": _VNNI, "avx2": _AVX2, "i8mm": _I8MM, "asimddp": _SDOT}
    dot = next((dot for feature, dot in known.items() if feature in features), Dot())
    needs = tuple(feature for feature in _USED.get(platform.machine(), ()) if feature in features)
    return Machine(
        "cpu", {"kind": "llvm", "mcpu": processor()}, dot, needs=needs, rows_in_turn=cpu_vendor() == "GenuineIntel",
        device=cpu_name(),
    )  # fmt: skip


# What LLVM may use in kernels.
_USED = {
    "x86_64": (
        *_V4, "avx512vbmi", "avx512ifma", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq", "avx512_vnni",
        "avx_vnni", "gfni",
    ),
    "aarch64": (*_V1, "sve2"),
}  # fmt: skip


def condition(feature: str) -> str:
    """Return the C expression that says whether the processor has a feature and the system enables it."""
    if feature == "avx_vnni":
        return "avx_vnni()"  # clang 14 has no name for it
    if feature in _USED["x86_64"]:
        return f'__builtin_cpu_supports("{feature.replace("_", "")}")'
    second = "2" if feature in ("i8mm", "bf16", "sve2") else ""
    return f"(getauxval(AT_HWCAP{second}) & HWCAP{second}_{feature.upper()})"
