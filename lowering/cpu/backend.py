"""The ``ramnet.ops`` backend for CPUs: builds and calls TVM kernels.

Kernels compute in float32, or in float64 if an input is float64; other dtypes are converted before and after. A kernel
reports that some slot is out of range before it accesses the memory; this module finds out which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowering.cpu import runtime
from lowering.cpu.build import lower
from lowering.targets import cpu_name
from ramnet.ops import checks, reference
from ramnet.ops.accesses import Accesses
from schedules import records
from schedules.cpu import SCHEDULES
from schedules.workload import Op, Workload


class CpuKernels:
    """A backend of ``ramnet.ops``.

    Args:
        tuned: use the tuned schedules of the records; if False, the default schedules.
        check: also check that slots are distinct and logits finite, as the reference does.
    """

    def __init__(self, tuned: bool = True, check: bool = False) -> None:
        runtime.match_threads()
        self.tuned, self.check = tuned, check
        self._kernels: dict[tuple[Any, ...], Any] = {}

    def kernel(self, op: Op, sizes: tuple[int, ...], dtype: torch.dtype, **constants: float) -> Any:
        """Return the compiled kernel of an op; ``sizes`` are in the order of ``schedules.workload.AXES``."""
        runtime.match_threads()
        key = (op, sizes, dtype, *constants.values())
        if key not in self._kernels:
            workload = Workload.of(op, sizes, dtype, constants)
            if self.tuned:
                schedule = records.choose(workload, "cpu", cpu_name()).schedule
            else:
                schedule = SCHEDULES[op].default(workload)
            self._kernels[key] = lower(workload, "cpu", schedule)
        return self._kernels[key]

    def address_decode(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if self.check:
            checks.logits_are_numbers(logits)
        order, sub_dim = logits.shape[-2:]
        rows = _ready(logits, reference.sum_type(logits)).view(-1, order, sub_dim)
        kernel = self.kernel("address_decode", (rows.shape[0], order, sub_dim, top_k), rows.dtype)
        rows, count = _at_least(rows, kernel.schedule.lanes)
        slots = torch.empty(rows.shape[0], top_k, dtype=torch.int32)
        weights = torch.empty(rows.shape[0], top_k, dtype=rows.dtype)
        if count:
            kernel.function(rows, slots, weights)
        shape = (*logits.shape[:-2], top_k)
        return slots[:count].view(shape), weights[:count].view(shape).to(logits.dtype)

    def address_decode_backward(self, grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        order, sub_dim = logits.shape[-2:]
        top_k = slots.shape[-1]
        dtype = reference.sum_type(logits)
        rows = _ready(logits, dtype).view(-1, order, sub_dim)
        kernel = self.kernel("address_decode_backward", (rows.shape[0], order, sub_dim, top_k), dtype)
        lanes = kernel.schedule.lanes
        rows, count = _at_least(rows, lanes)
        others = (_ready(grad_weights, dtype), _ready(slots, dtype), _ready(weights, dtype))
        grad_w, s, w = (_at_least(x.view(-1, top_k), lanes)[0] for x in others)
        grad = torch.empty_like(rows)
        if count:
            kernel.function(grad_w, rows, s, w, grad)
        return grad[:count].view(logits.shape).to(logits.dtype)

    def memory_scan(
        self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor,
        decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        self._check_slots(accesses, memory)
        if values.numel() == 0:
            return torch.empty(values.shape, dtype=values.dtype), memory.clone(), mass.clone()
        dtype = reference.sum_type(values, accesses.write_weights, memory)
        inputs = [_heads_first(x, dtype) for x in (*accesses, values, memory, mass)]
        sizes = (*inputs[0].shape, *memory.shape[2:])
        kernel = self.kernel("memory_scan", sizes, dtype, decay_power=decay_power, eps=eps)
        outputs = [torch.empty_like(x) for x in inputs[4:]]
        _run(kernel.function, (*inputs, *outputs), accesses, memory.shape[2])
        output, new_memory, new_mass = (
            x.view(like.shape).to(like.dtype) for x, like in zip(outputs, (values, memory, mass), strict=True)
        )
        return output, new_memory, new_mass

    def memory_scan_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], accesses: Accesses[Tensor], values: Tensor, memory: Tensor,
        mass: Tensor, decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        differentiable = (accesses.write_weights, accesses.read_weights, values, memory, mass)
        if values.numel() == 0:
            w, r, v = (torch.zeros(x.shape, dtype=x.dtype) for x in differentiable[:3])
            return w, r, v, grads[1].clone(), grads[2].clone()
        dtype = reference.sum_type(values, accesses.write_weights, memory)
        inputs = [_heads_first(x, dtype) for x in (*grads, *accesses, values, memory, mass)]
        sizes = (*inputs[3].shape, *memory.shape[2:])
        constants = {"decay_power": decay_power, "eps": eps, "proxy_eps": proxy_eps}
        kernel = self.kernel("memory_scan_backward", sizes, dtype, **constants)
        outputs = [torch.empty_like(inputs[i]) for i in (4, 6, 7, 8, 9)]
        _run(kernel.function, (*inputs, *outputs), accesses, memory.shape[2])
        grad_w, grad_r, grad_v, grad_s, grad_z = (
            x.view(like.shape).to(like.dtype) for x, like in zip(outputs, differentiable, strict=True)
        )
        return grad_w, grad_r, grad_v, grad_s, grad_z

    def memory_step(
        self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float
    ) -> Tensor:
        self._check_slots(accesses, memory)
        dtype = reference.sum_type(values, accesses.write_weights, memory)
        if memory.dtype != dtype:
            # For a half-precision state, the reference converts only the addressed rows.
            return reference.memory_step(accesses, values, memory, mass, decay_power, eps)
        batch, heads, top_k = accesses.write_slots.shape
        kernel = self.kernel("memory_step", (batch * heads, top_k, *memory.shape[2:]), dtype,
                             decay_power=decay_power, eps=eps)  # fmt: skip
        inputs = [_ready(x, dtype) for x in (*accesses, values)]
        output = torch.empty_like(inputs[4])
        if output.numel():
            _run(kernel.function, (*inputs, memory, mass, output), accesses, memory.shape[2])
        return output.to(values.dtype)

    def _check_slots(self, accesses: Accesses[Tensor], memory: Tensor) -> None:
        if self.check:
            checks.slots_are_valid(accesses, memory.shape[2])


def backend() -> CpuKernels:
    """Return the tuned kernels; an entry point of ``ramnet.backends``."""
    return CpuKernels()


def _run(kernel: Callable[..., None], arguments: Sequence[Tensor], accesses: Accesses[Tensor], num_slots: int) -> None:
    """Run a kernel. If it reports a slot out of range, raise a ValueError that names the slot."""
    try:
        kernel(*arguments)
    except RuntimeError:
        checks.slots_in_range(accesses, num_slots)
        raise


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a tensor contiguous and, if it is floating, convert it to ``dtype``."""
    if tensor.dtype != dtype and tensor.dtype.is_floating_point:
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _heads_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert [B, H, …] to a contiguous [B·H, …], of ``dtype`` if floating."""
    return _ready(tensor, dtype).flatten(0, 1)


def _at_least(rows: Tensor, lanes: int) -> tuple[Tensor, int]:
    """Pad ``rows`` to at least ``lanes`` rows, unless there are none. Returns them and the number before padding."""
    count = rows.shape[0]
    if 0 < count < lanes:
        rows = torch.cat([rows, rows[:1].expand(lanes - count, *rows.shape[1:])])
    return rows, count
