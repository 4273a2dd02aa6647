"""The ops on TIR kernels for GPUs: outputs and scratch are allocated here, and the launches of a template queued.

On tensors of the CPU the very templates run as loops (``lowering.gpu.threads``), so that they can be tested there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowering import cache
from lowering.fingerprint import fingerprint
from lowering.gpu.cuda.driver import Cubin
from lowering.gpu.templates import require
from lowering.targets import find, gpu_of, here
from schedules.base import Schedule
from schedules.workload import Op, Workload

# Launches one function of a template on tensors, in the order of its parameters.
Run = Callable[..., None]

_ready: dict[tuple[Any, ...], Run] = {}


def run(op: Op, schedule: Schedule, target: str, *arguments: Any) -> tuple[Tensor, ...]:
    """An op's outputs; arguments as ``lowering.gpu.backend.GpuKernels`` hands them to a plan.

    Raises:
        ValueError: for an op without a template, a schedule that is refused, and a target that TIR does not serve.
        NoNvccError: where nothing is cached and nvcc is not there to compile. ImportError, likewise, without TVM.
    """
    if "tir" not in find(target).compilers:
        raise ValueError(f"TIR does not compile for {target}; {' and '.join(find(target).compilers)} does")
    require(op)
    return _OPS[op](schedule, target, *arguments)


def binary(workload: Workload, target: str, schedule: Schedule, state: str = "float32") -> tuple[Cubin, bool]:
    """The kernels of ``workload`` from disk, or compiled now; and whether they were compiled now.

    They are for the GPU of this machine where there is one, else for the target's. Errors as in
    ``lowering.gpu.cuda.generate.generate`` and ``compile_cuda``.
    """
    device = here()
    gpu = device.gpu if device is not None and device.gpu is not None else gpu_of(target)
    made_from = fingerprint(workload.op, target, schedule)
    parts = (workload.kernel_name, gpu.arch, state, schedule.model_dump_json(), made_from)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    name = f"{workload.op}-{gpu.arch}-{key}.cubin"
    path = cache.find(name)
    if path is not None:
        return Cubin.read(path), False
    from lowering.gpu.cuda.generate import generate
    from lowering.gpu.templates import programs
    from lowering.nvcc import compile_cuda

    source = generate(workload, gpu, schedule, state)
    cubin, _ = compile_cuda(source.text, gpu.arch)
    functions = {}
    for p in programs(workload, schedule):
        grid = [list(x) if isinstance(x, tuple) else x for x in p.grid]
        functions[p.name] = {"arguments": source.arguments[p.name], "parameters": source.parameters(p.name),
                             "grid": grid, "threads": p.threads, "shared": source.shared[p.name]}  # fmt: skip
    made = Cubin(cubin, functions)
    cache.keep(name, made.write)
    return made, True


def on_cpu(workload: Workload, schedule: Schedule, state: str = "float32", reverse_threads: bool = False) -> Run:
    """The same templates as loops over programs and over threads, from the last one to the first if asked."""
    import tvm

    from lowering.gpu.cuda.generate import build
    from lowering.gpu.templates import template

    schedule.require(workload)
    module = template(workload, schedule, False, state, reverse_threads)
    # These passes only make the code faster, and take half of the build time.
    fast = ("s_tir.HoistIfThenElse", "s_tir.InsertHoistIfThenElse", "tirx.RemoveNoOp")
    functions = build(module, tvm.target.Target({"kind": "llvm", "opt-level": 0}), fast)
    return lambda name, *tensors: functions[name](*tensors)


def _kernels(op: Op, sizes: tuple[int, ...], dtype: torch.dtype, state: torch.dtype, schedule: Schedule, target: str,
             on_gpu: bool, **constants: float) -> Run:  # fmt: skip
    fixed = sizes[2:] if op.startswith("memory_scan") else sizes[1:]
    key = (op, fixed, dtype, state, schedule, target, on_gpu, *constants.values())
    if key not in _ready:
        workload = Workload.of(op, sizes, dtype, constants)
        if on_gpu:
            _ready[key] = binary(workload, target, schedule, _name(state))[0].run
        else:
            _ready[key] = on_cpu(workload, schedule, _name(state))
    return _ready[key]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _types(values: Tensor, memory: Tensor, *others: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of values and weights, of the state, and of sums: all are float64 where one is."""
    if torch.float64 in {x.dtype for x in (values, memory, *others)}:
        return torch.float64, torch.float64, torch.float64
    return values.dtype, memory.dtype, torch.float32


def _address_decode(schedule: Schedule, target: str, logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    slots = logits.new_empty(logits.shape[0], top_k, dtype=torch.int32)
    weights = logits.new_empty(logits.shape[0], top_k)
    if logits.numel():
        run = _kernels("address_decode", (*logits.shape, top_k), logits.dtype, logits.dtype, schedule, target,
                       logits.is_cuda)  # fmt: skip
        run("address_decode", logits, slots, weights)
    return slots, weights


def _address_decode_backward(schedule: Schedule, target: str, grad_weights: Tensor, logits: Tensor, slots: Tensor,
                             weights: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    grad = torch.empty_like(logits)
    if logits.numel():
        dtype = logits.dtype
        run = _kernels("address_decode_backward", (*logits.shape, slots.shape[1]), dtype, dtype, schedule, target,
                       logits.is_cuda)  # fmt: skip
        run("address_decode_backward", grad_weights.to(dtype), logits, slots, weights.to(dtype), grad)
    return (grad,)


def _memory_scan(
    schedule: Schedule, target: str, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor,
    read_weights: Tensor, values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, state, _ = _types(values, memory, mass, write_weights)
    run = _kernels("memory_scan", (*write_slots.shape, *memory.shape[1:]), dtype, state, schedule, target,
                   values.is_cuda, decay_power=decay_power, eps=eps)  # fmt: skip
    tensors = (write_slots, write_weights.to(dtype), read_slots, read_weights.to(dtype), values.to(dtype),
               memory.to(state), mass.to(state))  # fmt: skip
    outputs = [torch.empty_like(x) for x in tensors[4:]]
    run("memory_scan", *tensors, *outputs)
    return tuple(x.to(like.dtype) for x, like in zip(outputs, (values, memory, mass), strict=True))


def _memory_scan_backward(
    schedule: Any, target: str, grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor, write_slots: Tensor,
    write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float, eps: float, proxy_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, state, sums = _types(values, memory, mass, write_weights)
    run = _kernels("memory_scan_backward", (*write_slots.shape, *memory.shape[1:]), dtype, state, schedule, target,
                   values.is_cuda, decay_power=decay_power, eps=eps, proxy_eps=proxy_eps)  # fmt: skip
    (heads, T, K), D = write_slots.shape, memory.shape[-1]
    width, group = schedule.tile, schedule.group(heads)
    count, padded = -(-D // width), -(-T // schedule.chunk) * schedule.chunk
    kept = dtype if dtype == torch.bfloat16 else sums

    def scratch(*shape: int, of: torch.dtype = sums) -> Tensor:
        return values.new_empty((group, *shape), dtype=of)

    history, masses = scratch(padded, K, count * width, of=kept), [scratch(padded, K) for _ in range(3)]
    parts = [scratch(count, padded, K) for _ in range(2)]
    grads = [torch.empty_like(x, dtype=dtype) for x in (write_weights, read_weights, values)]
    firsts = [torch.empty_like(x, dtype=state) for x in (memory, mass)]
    for first in range(0, heads, group):
        mine = slice(first, min(first + group, heads))
        size = mine.stop - first
        kept_rows, old, inverses, pushes, read_parts, write_parts = (x[:size] for x in (history, *masses, *parts))
        dO, dS1, dZ1 = grad_output[mine].to(dtype), grad_memory[mine].to(state), grad_mass[mine].to(state)
        WS, W, RS, R = write_slots[mine], write_weights[mine].to(dtype), read_slots[mine], read_weights[mine].to(dtype)
        V, S0, Z0 = values[mine].to(dtype), memory[mine].to(state), mass[mine].to(state)
        dW, dR, dV, dS, dZ = (x[mine] for x in (*grads, *firsts))
        run("recompute", dO, WS, W, RS, V, S0, Z0, kept_rows, read_parts, old, inverses)
        run("reads", read_parts, R, inverses, dR, pushes)
        run("reverse", dO, dS1, dZ1, WS, W, RS, R, V, kept_rows, old, inverses, pushes, dV, write_parts, dS, dZ)
        run("writes", write_parts, dW)
    outputs = (*grads, *firsts)
    inputs = (write_weights, read_weights, values, memory, mass)
    return tuple(x.to(like.dtype) for x, like in zip(outputs, inputs, strict=True))


def _memory_step(
    schedule: Schedule, target: str, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor,
    read_weights: Tensor, values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if memory.dtype != mass.dtype:
        raise ValueError(f"memory is {memory.dtype} and mass {mass.dtype}; TIR's step takes one type for both")
    dtype = torch.float64 if memory.dtype == torch.float64 else values.dtype
    sizes = (*write_slots.shape, *memory.shape[1:])
    output = torch.empty_like(values, dtype=dtype)
    if output.numel():
        run = _kernels("memory_step", sizes, dtype, memory.dtype, schedule, target, values.is_cuda,
                       decay_power=decay_power, eps=eps)  # fmt: skip
        run("memory_step", write_slots, write_weights.to(dtype), read_slots, read_weights.to(dtype), values.to(dtype),
            memory, mass, output)  # fmt: skip
    return (output.to(values.dtype),)


def _decode_heads(
    schedule: Schedule, target: str, projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor,
    mass: Tensor, order: int, sub_dim: int, top_k: int, cape_heads: int, temperature: float, decay_power: float,
    eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if memory.dtype != mass.dtype:
        raise ValueError(f"memory is {memory.dtype} and mass {mass.dtype}; TIR's step takes one type for both")
    batch, heads, slots, dim = memory.shape
    dtype = torch.float64 if memory.dtype == torch.float64 else projected.dtype
    output = projected.new_empty((batch, heads, dim), dtype=dtype)
    if output.numel():
        run = _kernels("decode_heads", (batch * heads, order, sub_dim, top_k, slots, dim), dtype, memory.dtype,
                       schedule, target, projected.is_cuda, decay_power=decay_power, eps=eps, cape_heads=cape_heads,
                       temperature=temperature)  # fmt: skip
        run("decode_heads", projected.to(dtype), log_scale.to(dtype), position.to(torch.int64), memory, mass, output)
    return (output.view(batch, heads * dim).to(projected.dtype),)


_OPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "address_decode": _address_decode,
    "address_decode_backward": _address_decode_backward,
    "memory_scan": _memory_scan,
    "memory_scan_backward": _memory_scan_backward,
    "memory_step": _memory_step,
    "decode_heads": _decode_heads,
}
