"""A workload made concrete: inputs as a model gives them, the right answer, and what it takes to be near it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lowering.cpu import CpuKernels
from lowering.kernels import Kernel
from ramnet.ops import reference
from schedules.workload import Workload

# Largest relative RMSE against the reference in float64; float32 kernels stay below 1e-6.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
# Checked on more tokens than the longest chunk of a schedule, and no multiple of any; heads beyond a few only repeat.
CHECKED_TOKENS, CHECKED_HEADS = 1061, 4
# No multiple of any vector's lanes.
CHECKED_ROWS = 1021


@dataclass(frozen=True)
class Problem:
    """An op's workload with the arguments that ``ramnet.ops`` backends take, drawn from ``seed``."""

    workload: Workload
    seed: int = 0

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Of the workload's type. Slots are distinct within a token, weights are a product softmax's."""
        return _arguments(self.workload, self.seed)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The reference's answer, computed in float64 from the same numbers."""
        return self._answer(reference, tuple(_double(x) for x in self.arguments))

    def call(self, backend: Any) -> Callable[[], Any]:
        """The op on ``backend`` (or on the reference, eager PyTorch), ready to be timed.

        ``memory_step`` works on a state of its own, which goes on from call to call.
        """
        return partial(getattr(backend, self.workload.op), *_clone_state(self.workload, self.arguments))

    def error(self, backend: Any) -> float:
        """The largest relative RMSE of the op's results on ``backend``; infinite for NaN."""
        found = self._answer(backend, self.arguments)
        return max(map(_relative_rmse, found, self.expected))

    def _answer(self, backend: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """What there is to compare: the results, and what was updated in place."""
        arguments = _clone_state(self.workload, arguments)
        result = getattr(backend, self.workload.op)(*arguments)
        if self.workload.op == "address_decode":
            # Addresses of nearly equal weight may stand in either order, so they are compared by their weights.
            slots, weights = result
            return weights, _weights_of(_double(arguments[0]), slots), _distinct(slots)
        if self.workload.op == "memory_step":
            return result, *arguments[5:7]
        return result if isinstance(result, tuple) else (result,)


def checked(workload: Workload) -> Workload:
    """The workload that candidates for ``workload`` are checked on: the same kernel at other dynamic sizes."""
    shape = dict(workload.shape)
    if "T" in shape:
        shape.update(T=CHECKED_TOKENS, N=min(shape["N"], CHECKED_HEADS))
    if "R" in shape:
        shape.update(R=min(shape["R"], CHECKED_ROWS) + 1)
    return workload.model_copy(update={"shape": shape})


class OneKernel(CpuKernels):
    """The backend whose every op is one given kernel."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.given = kernel

    def kernel(self, *_: Any, **__: Any) -> Kernel:
        return self.given


def _arguments(workload: Workload, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, workload.dtype)
    shape, constants = workload.shape, workload.constants
    K = shape["K"]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    if "R" in shape:
        logits = 2 * normal(shape["R"], shape["U"], shape["P"])
        if workload.op == "address_decode":
            return logits, K
        slots, weights = reference.address_decode(logits, K)
        return normal(*weights.shape), logits, slots, weights

    N, M, D = shape["N"], shape["M"], shape["D"]
    leading = (1, N, shape["T"]) if "T" in shape else (1, N)
    sub_dim, order = _digits(M)

    def access() -> tuple[Tensor, Tensor]:
        return reference.address_decode(2 * normal(*leading, order, sub_dim), K)

    (write_slots, write_weights), (read_slots, read_weights) = access(), access()
    values, memory = normal(*leading, D), normal(1, N, M, D)
    mass = (0.5 + torch.rand(1, N, M, generator=generator)).to(dtype)
    tensors = (write_slots, write_weights, read_slots, read_weights, values, memory, mass)
    step = (*tensors, constants.get("decay_power", 1.0), constants.get("eps", 1e-6))
    if workload.op == "memory_step":
        return step
    scan = (*step, constants.get("proxy_eps", 0.01))
    if workload.op == "memory_scan":
        return scan
    return normal(*values.shape), normal(*memory.shape), normal(*mass.shape), *scan


def _digits(slots: int) -> tuple[int, int]:
    """P and U with P^U = M, the smallest P ≥ 4 that has one, else M itself."""
    for sub_dim in range(4, slots):
        order = round(torch.tensor(float(slots)).log().item() / torch.tensor(float(sub_dim)).log().item())
        if sub_dim**order == slots:
            return sub_dim, order
    return slots, 1


def _clone_state(workload: Workload, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with a state of their own where the op updates it in place."""
    if workload.op != "memory_step":
        return arguments
    return *arguments[:5], arguments[5].clone(), arguments[6].clone(), *arguments[7:]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _weights_of(logits: Tensor, slots: Tensor) -> Tensor:
    """The product softmax [R, U, P] at slots [R, K]; 0 for a slot out of range."""
    order, sub_dim = logits.shape[-2:]
    outside = (slots < 0) | (slots >= sub_dim**order)
    powers = sub_dim ** torch.arange(order)
    digits = slots.long().masked_fill(outside, 0).unsqueeze(-2) // powers.unsqueeze(-1) % sub_dim  # [R, U, K]
    return logits.log_softmax(-1).gather(-1, digits).sum(-2).exp().masked_fill(outside, 0)


def _distinct(slots: Tensor) -> Tensor:
    """How many of a row's slots [R, K] differ from its others, [R]."""
    ordered = slots.sort(-1).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).double().sum(-1)


def _relative_rmse(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    error = float((found.double() - expected.double()).norm())
    scale = float(expected.double().norm())
    if error == 0:
        return 0.0
    return error / scale if scale > 0 and error == error else float("inf")
