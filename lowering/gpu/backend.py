"""The ``ramnet.ops`` backend for GPUs: chooses schedules for the tensors' sizes and runs the kernels.

Sums are float32, or float64 if an input is. Inputs may have any floating dtype and are not converted beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowering.gpu.decode_heads.options import MixerOptions
from lowering.gpu.kernels import plan
from lowering.gpu.offline import too_large, why_unsupported
from lowering.targets import device_of, gpu_of, here
from ramnet.ops import checks
from ramnet.ops.accesses import Accesses
from ramnet.ops.reference import sum_type
from schedules import records
from schedules.base import Schedule
from schedules.kinds import default_schedule
from schedules.workload import Op, Workload


class GpuKernels:
    """A backend of ``ramnet.ops``.

    Args:
        target: the target whose records are used.
        tuned: use tuned schedules of the records if this machine has their compilers; if False, the default schedules.
        check: also check that slots are distinct and logits finite, which synchronises with the device.
        given: schedules by op that override both.

    ``gpu`` is the GPU that kernels are compiled for: this machine's, or the target's if this machine has none.
    """

    def __init__(
        self, target: str, tuned: bool = True, check: bool = False, given: dict[str, Schedule] | None = None
    ) -> None:
        self.target, self.tuned, self.check, self.given = target, tuned, check, given or {}
        present = here()
        self.gpu = present.gpu if present is not None and present.gpu is not None else gpu_of(target)
        self._schedules: dict[tuple[Any, ...], Schedule] = {}

    def schedule(self, op: Op, sizes: tuple[int, ...], dtype: torch.dtype, **constants: float) -> Schedule:
        """Return the schedule of an op; ``sizes`` are in the order of ``schedules.workload.AXES``."""
        if op in self.given:
            return self.given[op]
        key = (op, sizes, dtype, *constants.values())
        if key not in self._schedules:
            workload = Workload.of(op, sizes, dtype, constants)
            if self.tuned:

                def refused(schedule: Schedule) -> str | None:  # such as one whose compiler is not installed here
                    return why_unsupported(schedule, self.target, workload) or too_large(schedule, workload, self.gpu)

                choice = records.choose(workload, self.target, device_of(self.target), refused)
                self._schedules[key] = choice.schedule
            else:
                self._schedules[key] = default_schedule(workload, self.target)
        return self._schedules[key]

    def address_decode(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if self.check:
            checks.logits_are_numbers(logits)
        rows = logits.contiguous().flatten(0, -3) if logits.dim() > 2 else logits.contiguous().unsqueeze(0)
        schedule = self.schedule("address_decode", (*rows.shape, top_k), logits.dtype)
        slots, weights = self._run("address_decode", schedule, rows, top_k)
        shape = (*logits.shape[:-2], top_k)
        return slots.view(shape), weights.view(shape)

    def address_decode_backward(self, grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        order, sub_dim = logits.shape[-2:]
        top_k = slots.shape[-1]
        rows = logits.contiguous().view(-1, order, sub_dim)
        others = (x.contiguous().view(-1, top_k) for x in (slots, weights))
        schedule = self.schedule("address_decode_backward", (*rows.shape, top_k), logits.dtype)
        grads = grad_weights.contiguous().view(-1, top_k)
        (grad,) = self._run("address_decode_backward", schedule, grads, rows, *others)
        return grad.view(logits.shape)

    def memory_scan(
        self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor,
        decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        self._check_slots(accesses, memory)
        if values.numel() == 0:
            return torch.empty_like(values), memory.clone(), mass.clone()
        inputs = [_heads_first(x) for x in (*accesses, values, memory, mass)]
        sizes = (*inputs[0].shape, *memory.shape[2:])
        dtype = _workload_type(values, accesses.write_weights, memory)
        schedule = self.schedule("memory_scan", sizes, dtype, decay_power=decay_power, eps=eps)
        outputs = self._run("memory_scan", schedule, *inputs, decay_power, eps)
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
            w, r, v = (torch.zeros_like(x) for x in differentiable[:3])
            return w, r, v, grads[1].clone(), grads[2].clone()
        inputs = [_heads_first(x) for x in (*grads, *accesses, values, memory, mass)]
        sizes = (*inputs[3].shape, *memory.shape[2:])
        constants = {"decay_power": decay_power, "eps": eps, "proxy_eps": proxy_eps}
        dtype = _workload_type(values, accesses.write_weights, memory)
        schedule = self.schedule("memory_scan_backward", sizes, dtype, **constants)
        outputs = self._run("memory_scan_backward", schedule, *inputs, *constants.values())
        grad_w, grad_r, grad_v, grad_s, grad_z = (
            x.view(like.shape).to(like.dtype) for x, like in zip(outputs, differentiable, strict=True)
        )
        return grad_w, grad_r, grad_v, grad_s, grad_z

    def memory_step(
        self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float
    ) -> Tensor:
        self._check_slots(accesses, memory)
        inputs = [_heads_first(x) for x in (*accesses, values)]
        state = (memory.view(-1, *memory.shape[2:]), mass.view(-1, mass.shape[2]))
        sizes = (*inputs[0].shape, *memory.shape[2:])
        dtype = _workload_type(values, accesses.write_weights, memory)
        schedule = self.schedule("memory_step", sizes, dtype, decay_power=decay_power, eps=eps)
        (output,) = self._run("memory_step", schedule, *inputs, *state, decay_power, eps)
        return output.view(values.shape).to(values.dtype)

    def decode_heads(
        self, projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor,
        options: MixerOptions,
    ) -> Tensor:  # fmt: skip
        """Run one token of a RAM-Net layer between its two projections, updating ``memory`` and ``mass`` in place.

        Args:
            projected: the concatenated products of x with W_q, W_k and W_v, [B, 2·H·U·P + H·D], contiguous.
            log_scale: α of W_q and of W_k, [2, H].
            position: int64 [B] on the device.
            memory, mass: [B, H, M, D] and [B, H, M], contiguous.
            options: the attributes of the layer that are not tensors.

        Returns:
            [B, H·D], the input of W_o, of the dtype of ``projected``.
        """
        batch, heads, slots, dim = memory.shape
        sizes = (batch * heads, options.order, options.sub_dim, options.top_k, slots, dim)
        constants = {"decay_power": options.decay_power, "eps": options.eps}
        schedule = self.schedule("decode_heads", sizes, _workload_type(projected, memory), **constants)
        (output,) = self._run("decode_heads", schedule, projected, log_scale, position, memory, mass, *options)
        return output.to(projected.dtype)

    def _run(self, op: Op, schedule: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return plan(op, schedule, *arguments).run(self.gpu)

    def _check_slots(self, accesses: Accesses[Tensor], memory: Tensor) -> None:
        if self.check:
            checks.slots_are_valid(accesses, memory.shape[2])
        elif not memory.is_cuda:  # Triton's interpreter; on a GPU ``ramnet.ops`` has already queued the check
            checks.slots_in_range(accesses, memory.shape[2])


def _workload_type(values: Tensor, *others: Tensor) -> torch.dtype:
    """Return the dtype that a schedule is chosen for: that of the values, or float64 if sums are."""
    return torch.float64 if sum_type(values, *others) == torch.float64 else values.dtype


def _heads_first(tensor: Tensor) -> Tensor:
    """Convert [B, H, …] to a contiguous [B·H, …]."""
    return tensor.contiguous().flatten(0, 1)
