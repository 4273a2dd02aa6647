"""Functions that emit TIR, called from TVMScript while it is parsed.

Unrolled code whose structure depends on K, U or P, such as sorting networks and sums over slots, is emitted by Python
loops. TVM puts a buffer of less than 1024 bytes on the stack, where LLVM can keep it in registers, and a larger one in
a workspace.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from ramnet.ops.accesses import Accesses

# The message of a kernel's error for a slot outside 0..M-1.
OUT_OF_RANGE = "a slot is out of range"

Expression = Any
Emit = Callable[[Any], Expression]


def constant(value: float, dtype: str) -> Expression:
    return tir.const(value, dtype)


def sum_type(dtype: str) -> str:
    """Return the dtype in which values of ``dtype`` are summed."""
    return "float64" if dtype == "float64" else "float32"


def argument(handle: Any, shape: Any, dtype: str) -> Any:
    """Declare the buffer of a kernel's argument, aligned to its element size and with int64 sizes and offsets.

    By default TVM assumes an alignment of 64 bytes and emits vector moves that fault otherwise, but tensors from
    safetensors and NumPy, and views, are only aligned to their element size. int64 allows more than 2^31 elements.
    """
    sizes = [T.int64(size) if isinstance(size, int) else size for size in shape]
    return T.match_buffer(handle, sizes, dtype, align=tvm.DataType(dtype).bits // 8)


def arguments(handles: Sequence[Any], shape: Any, dtype: str) -> tuple[Any, ...]:
    """Return the buffers of several arguments of one shape and dtype."""
    return tuple(argument(handle, shape, dtype) for handle in handles)


def accesses(handles: Sequence[Any], shape: Any, dtype: str) -> Accesses[Any]:
    """Return the buffers of write_slots, write_weights, read_slots and read_weights, the weights in ``dtype``."""
    return Accesses(*(argument(x, shape, of) for x, of in zip(handles, ("int32", dtype) * 2, strict=True)))


def registers(cuda: bool, size: int, dtype: str) -> Any:
    """Allocate ``size`` values per thread, which must be indexed by constants only."""
    return T.sblock_alloc_buffer((size,), dtype, scope="local" if cuda else "global")


def copy(to: Any, to_at: list[Any], source: Any, at: list[Any], width: int) -> None:
    """Emit ``to[*to_at, + i] = source[*at, + i]`` for i < width along the last axis.

    It moves vectors of 4 or 2 elements if they divide the width; rows and offsets must be multiples of them.
    """
    vector = next(v for v in (4, 2, 1) if width % v == 0)
    for start in range(0, width, vector):
        with builder.vectorized(0, vector) as lane:
            builder.buffer_store(to, source[(*at[:-1], at[-1] + start + lane)], [*to_at[:-1], to_at[-1] + start + lane])


def put(cuda: bool, to: Any, at: list[Any], width: int, value: Callable[[int], Expression]) -> None:
    """Emit ``to[*at, + i] = value(i)`` for i < width along the last axis, converted to its dtype; see ``copy``."""
    held = registers(cuda, width, to.dtype)
    for i in range(width):
        builder.buffer_store(held, value(i).astype(to.dtype), [i])
    copy(to, at, held, [0], width)


def below(index: Any, limit: Any, body: Callable[[Any], None]) -> None:
    """Emit ``if index < limit: body(index)``."""
    with builder.If(index < limit), builder.Then():
        body(index)


def lanes(width: int, *stores: tuple[Any, list[Any], Emit]) -> None:
    """Emit one vectorised loop with ``buffer[*row, lane] = value(lane)`` for each store in turn."""
    with builder.vectorized(0, width) as lane:
        for buffer, row, value in stores:
            builder.buffer_store(buffer, value(lane), [*row, lane])


def tiles(buffer: Any, row: list[Any], start: Any, width: int, value: Emit) -> None:
    """Emit the vectorised loop ``buffer[*row, start + lane] = value(start + lane)``."""
    with builder.vectorized(0, width) as lane:
        builder.buffer_store(buffer, value(start + lane), [*row, start + lane])


def store(buffer: Any, row: list[Any], value: Expression) -> None:
    builder.buffer_store(buffer, value, row)


def row(buffer: Any, at: list[Any], width: int, value: Emit, limit: int = 64) -> None:
    """Emit ``buffer[*at, k] = value(k)`` for k < width, in vectors of at most ``limit`` lanes."""
    lanes_each = max(d for d in range(1, min(width, limit) + 1) if width % d == 0)
    with builder.serial(0, width // lanes_each) as group, builder.vectorized(0, lanes_each) as lane:
        k = group * lanes_each + lane
        builder.buffer_store(buffer, value(k), [*at, k])


def each_slot(top_k: int, unroll: int, body: Callable[[Any], None]) -> None:
    """Emit a loop of ``body(k)`` over the K slots of a token, unrolled by ``unroll``."""
    groups = top_k // unroll
    if groups > 1:
        with builder.serial(0, groups) as group:
            for j in range(unroll):
                body(group * unroll + j)
    for k in range(groups * unroll if groups > 1 else 0, top_k):
        body(k)


def sum_slots(top_k: int, unroll: int, term: Callable[[Any], Emit], into: Callable[[Emit], None], so_far: Emit) -> None:
    """Emit ``into`` the sum over slots of ``term(k)(channel)``, ``unroll`` terms per statement.

    ``so_far`` reads back the partial sum that ``into`` has stored.
    """
    first = top_k if top_k < 2 * unroll else unroll

    def partial(ks: list[Any], start: Emit | None) -> Emit:
        def value(channel: Any) -> Expression:
            total = None if start is None else start(channel)
            for k in ks:
                total = term(k)(channel) if total is None else total + term(k)(channel)
            return total

        return value

    into(partial(list(range(first)), None))
    groups = (top_k - first) // unroll
    if groups:
        with builder.serial(0, groups) as group:
            into(partial([first + group * unroll + j for j in range(unroll)], so_far))
    rest = list(range(first + groups * unroll, top_k))
    if rest:
        into(partial(rest, so_far))


def prefetch(buffer: Any, at: list[Any], start: Any, width: int) -> None:
    """Emit prefetches of the cache lines of ``buffer[*at, start : start + width]``."""
    line = 64 * 8 // tvm.DataType(buffer.dtype).bits
    for d in range(0, width, line):
        address = tir.address_of(buffer[(*at, start + d)])
        read, keep, data = (tir.const(flag, "int32") for flag in (0, 3, 1))
        builder.evaluate(tir.call_llvm_intrin("void", "llvm.prefetch", address, read, keep, data))


def slots_in_range(slots: Sequence[Any], tokens: Any, top_k: int, num_slots: int, at: Emit) -> Expression:
    """Return whether ``slot[*at(i), k]`` is in 0..M-1 for all i < tokens, k < K and each of ``slots``.

    It compares the maximum as unsigned integers, as which negative slots are large.
    """
    largest = T.sblock_alloc_buffer((top_k,), "uint32")

    def larger(i: Any, k: Any) -> Expression:
        found = largest[k]
        for each in slots:
            found = tir.max(found, each[(*at(i), k)].astype("uint32"))
        return found

    row(largest, [], top_k, lambda _: constant(0, "uint32"))
    with builder.serial(0, tokens) as i:
        row(largest, [], top_k, lambda k: larger(i, k))
    with builder.serial(1, top_k) as k:
        builder.buffer_store(largest, tir.max(largest[0], largest[k]), [0])
    return largest[0] < constant(num_slots, "uint32")


def clear(flags: Any, count: Any) -> None:
    """Emit setting ``count`` flags to 0."""
    with T.sblock("clear"), builder.serial(0, count) as i:
        builder.buffer_store(flags, constant(0, "int32"), [i])


def refuse_any(flags: Any, count: Any) -> None:
    """Emit an assertion that fails with ``OUT_OF_RANGE`` if a flag is set.

    It cannot be within a parallel loop, as TVM's thread pool sometimes loses the error of a task.
    """
    with T.sblock("refuse"):
        found = T.sblock_alloc_buffer((1,), "int32")
        builder.buffer_store(found, constant(0, "int32"), [0])
        with builder.serial(0, count) as i:
            builder.buffer_store(found, tir.max(found[0], flags[i]), [0])
        with builder.Assert(found[0] == 0, OUT_OF_RANGE):
            pass


def horizontal_sum(buffer: Any, width: int) -> Expression:
    """Emit a tree reduction of the ``width`` lanes of ``buffer`` and return its element 0, their sum."""
    while width > 1:
        half = (width + 1) // 2
        lanes(width - half, (buffer, [], lambda lane, half=half: buffer[lane] + buffer[lane + half]))  # type: ignore[misc]
        width = half
    return buffer[0]


def exp(x: Expression, dtype: str) -> Expression:
    """Return e^x for x ≤ 0; NaN for NaN.

    For float32 it is the Cephes polynomial, which is vectorised, where libm's exp is one call per lane. float64 uses
    libm's. The clamp is a Select because ``max`` would drop NaN.
    """
    if dtype != "float32":
        return tir.exp(x)
    lowest = constant(-87.0, dtype)
    x = tir.Select(x < lowest, lowest, x)
    whole = tir.floor(x * constant(1.44269504, dtype) + constant(0.5, dtype))
    rest = x - whole * constant(0.693359375, dtype) + whole * constant(2.12194440e-4, dtype)
    power = constant(1.9875691500e-4, dtype)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        power = power * rest + constant(c, dtype)
    power = power * rest * rest + rest + constant(1.0, dtype)
    exponent = (whole.astype("int32") + constant(127, "int32")) << constant(23, "int32")
    return power * tir.reinterpret("float32", exponent)


def power(x: Expression, exponent: float, dtype: str) -> Expression:
    """Return x^exponent for x ≥ 0, as a product of x and its roots if the exponent is a multiple of 1/4 from −1 to 4.

    Roots are vectorised, where libm's pow is one call per lane: with γ = 1/4, a scan takes half of the time that pow
    makes it take.
    """
    if exponent == 0:
        return constant(1.0, dtype)
    whole, quarters = divmod(4 * abs(exponent), 4)
    if not (-1 <= exponent <= 4 and quarters.is_integer()):
        return tir.pow(x, constant(exponent, dtype))
    root = tir.sqrt(x)
    factors = [x] * int(whole) + [root] * (quarters >= 2) + [tir.sqrt(root)] * (quarters % 2 == 1)
    result = reduce(operator.mul, factors)
    return result if exponent > 0 else constant(1.0, dtype) / result


def decay(weight: Expression, decay_power: float, dtype: str) -> Expression:
    """Return (1 − w)^γ (paper, step 5)."""
    return power(constant(1.0, dtype) - weight, decay_power, dtype)


def decay_slope(weight: Expression, decay_power: float, proxy_eps: float, dtype: str) -> Expression:
    """Return the derivative of the proxy (ε' + (1 − ε')(1 − w))^γ with respect to w (paper, step 7)."""
    scale = -decay_power * (1 - proxy_eps)
    if scale == 0:
        return constant(0.0, dtype)
    base = constant(proxy_eps, dtype) + constant(1 - proxy_eps, dtype) * (constant(1.0, dtype) - weight)
    return constant(scale, dtype) * power(base, decay_power - 1, dtype)
