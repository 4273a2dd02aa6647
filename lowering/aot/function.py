"""TIR functions of pointers and numbers, without tensors, so that an object needs nothing of TVM's runtime."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as builder

from lowering.aot.integers import Int4, Int8
from lowering.aot.machines import Machine
from lowering.aot.matrix import Bfloat16, Float32, Matrix, Tiling
from lowering.aot.weights import LONGEST_BLOCK, storage

FORMATS: dict[str, type[Matrix]] = {"float32": Float32, "bfloat16": Bfloat16, "int8": Int8, "int4": Int4}
# By the type in a safetensors file.
_TYPES = {"F32": "float32", "BF16": "uint16", "I8": "int8", "U8": "uint8"}
_BYTES = {"int8": 1, "uint8": 1, "uint16": 2, "int32": 4, "float32": 4}


class Buffer(NamedTuple):
    """A parameter that points to an array."""

    shape: tuple[int, ...]
    dtype: str = "float32"


class Weight(NamedTuple):
    """A parameter that is a matrix [outputs, inputs]: two pointers, to its elements and to its scales."""

    outputs: int
    inputs: int
    precision: str


Parameters = dict[str, str | Buffer | Weight]  # by name; a string is the type of a number


def vector(size: int) -> Buffer:
    return Buffer((size,))


def rows(width: int) -> Buffer:
    """Return the parameter of a value of each token of a block."""
    return Buffer((LONGEST_BLOCK, width))


def prefix(machine: Machine) -> str:
    """Return what the names of a machine's functions begin with."""
    return f"ramnet_{machine.symbol}_"


def function(name: str, parameters: Parameters, made_for: tuple[Machine, Tiling], body: Callable[[Any], None]) -> Any:
    """Return the function ``ramnet_<symbol of the machine>_<name>``, whose code ``body`` emits.

    Args:
        made_for: the processor, and the loops of products.
        body: takes a namespace with the parameters by their names: numbers, buffers and matrices. If there are
            matrices, the last two parameters are ``rounded`` and ``steps``, the scratch memory of ``Matrix.prepare``.
    """
    symbol = f"{prefix(made_for[0])}{name}"
    with IRBuilder() as made, builder.prim_func(s_tir=True):
        builder.func_name(symbol)
        builder.func_attr({"global_symbol": symbol, "tir.noalias": True})
        pointers: dict[str, tuple[Any, Buffer]] = {}
        found: dict[str, Any] = {}

        def pointer(of: str, kind: Buffer) -> None:
            pointers[of] = builder.arg(of, T.handle(kind.dtype)), kind

        for each, kind in parameters.items():
            if isinstance(kind, str):
                found[each] = builder.arg(each, getattr(T, kind)())
            elif isinstance(kind, Buffer):
                pointer(each, kind)
            else:
                elements, scale = storage(kind.precision, kind.outputs, kind.inputs)
                pointer(each, Buffer(elements.shape, _TYPES[elements.dtype]))
                pointer(f"{each}_scale", Buffer(scale.shape, _TYPES[scale.dtype]) if scale else vector(0))
        weights = {each: kind for each, kind in parameters.items() if isinstance(kind, Weight)}
        if weights:
            widest = max(kind.inputs for kind in weights.values())
            pointer("rounded", Buffer((LONGEST_BLOCK * widest * 3 // 2,), "int8"))
            pointer("steps", vector(LONGEST_BLOCK))
        # Every parameter must be declared before the first buffer is.
        buffers = {each: _buffer(address, kind) for each, (address, kind) in pointers.items()}
        made_of = {
            each: FORMATS[kind.precision](kind.outputs, kind.inputs, buffers[each], buffers[f"{each}_scale"], *made_for)
            for each, kind in weights.items()
        }
        body(SimpleNamespace(**{**found, **buffers, **made_of}))
    return made.get()


def _buffer(address: Any, kind: Buffer) -> Any:
    """Declare the buffer at a pointer, which need only be aligned to the element size."""
    sizes = [T.int64(size) for size in kind.shape]
    return builder.decl_buffer(sizes, kind.dtype, data=address, align=_BYTES[kind.dtype])
