"""Inputs of a workload, distributed as in a model, with the expected results and tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autotune.measure import eager_decode_heads
from autotune.measure.eager_decode_heads import EAGER
from lowering.cpu.backend import CpuKernels
from lowering.cpu.build import Kernel
from lowering.gpu.decode_heads.options import MixerOptions
from ramnet.ops import reference
from ramnet.ops.accesses import Accesses
from schedules.workload import Workload, heads_of

# The largest relative RMSE against the reference in float64 on the same rounded inputs. float32 kernels stay below
# 1e-6; narrower dtypes round their results once.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 6e-3, "float16": 1e-3}
# The check uses more tokens than the longest chunk of a schedule, not a multiple of any, and a few heads.
CHECKED_TOKENS, CHECKED_HEADS = 1061, 4
# The most rows of the check, less 1: 1022 is not a multiple of 4 or more vector lanes.
CHECKED_ROWS = 1021
# The positions of the arguments that an op updates in place.
IN_PLACE = {"memory_step": slice(2, 4), "decode_heads": slice(3, 5)}


class WrongResultError(Exception):
    """A kernel's results differ from the reference."""

    status = "wrong_result"


@dataclass(frozen=True)
class Problem:
    """An op's workload with the arguments that ``ramnet.ops`` backends take, drawn from ``seed`` on ``device``."""

    workload: Workload
    seed: int = 0
    device: str = "cpu"

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments, of the workload's dtype, except that the state is at least float32 as in a model.

        Slots are distinct within a token, and weights are those of a product softmax.
        """
        return _arguments(self.workload, torch.Generator(self.device).manual_seed(self.seed))

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The reference's results, computed on the CPU in float64 from the same numbers."""
        return self.answer(EAGER, tree_map(_double, self.arguments))

    def call(self, backend: Any) -> Callable[[], Any]:
        """Return a function to be timed, which runs the op on ``backend`` (None is the reference).

        An op that works in place has its own copy of the state, which is kept between calls.
        """
        return partial(getattr(backend, self.workload.op), *_clone_state(self.workload, self.arguments))

    def error(self, backend: Any) -> float:
        """Return the largest relative RMSE of the op's results on ``backend``; infinity for NaN."""
        found = self.answer(backend, self.arguments)
        return max(map(relative_rmse, found, self.expected))

    def check(self, backend: Any) -> None:
        """Raise WrongResultError, with the error and the tolerance, if the results differ from the reference."""
        error, allowed = self.error(backend), TOLERANCE[self.workload.dtype]
        if not error <= allowed:
            raise WrongResultError(f"the relative RMSE is {error:.1e}; {allowed:.0e} is allowed")

    def answer(self, backend: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Return what is compared: the results, and the arguments that were updated in place."""
        arguments = _clone_state(self.workload, arguments)
        result = getattr(backend, self.workload.op)(*arguments)
        if self.workload.op == "address_decode":
            # Addresses of nearly equal weight may stand in either order, so they are compared by their weights.
            slots, weights = result
            return weights, _weights_of(arguments[0].double(), slots), _distinct(slots)
        if self.workload.op in IN_PLACE:
            return result, *arguments[IN_PLACE[self.workload.op]]
        return result if isinstance(result, tuple) else (result,)


def checked(workload: Workload) -> Workload:
    """Return the workload on which candidates are checked: the same kernel at other dynamic sizes."""
    shape = dict(workload.shape)
    if "T" in shape:
        shape.update(T=CHECKED_TOKENS, N=min(shape["N"], CHECKED_HEADS))
    if "R" in shape:
        shape.update(R=min(shape["R"], CHECKED_ROWS) + 1)
    return workload.model_copy(update={"shape": shape})


class OneKernel(CpuKernels):
    """A backend whose ops run one given kernel."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.given = kernel

    def kernel(self, *_: Any, **__: Any) -> Kernel:
        return self.given


def _arguments(workload: Workload, generator: torch.Generator) -> tuple[Any, ...]:
    dtype = getattr(torch, workload.dtype)
    state_dtype = torch.promote_types(dtype, torch.float32)
    shape, constants = workload.shape, workload.constants
    K = shape["K"]

    def normal(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

    if "R" in shape:
        logits = 2 * normal(shape["R"], shape["U"], shape["P"])
        if workload.op == "address_decode":
            return logits, K
        slots, weights = reference.address_decode(logits, K)
        return normal(*weights.shape), logits, slots, weights

    N, M, D = shape["N"], shape["M"], shape["D"]
    decay_power, eps = constants.get("decay_power", 1.0), constants.get("eps", 1e-6)

    def mass_of(*leading: int) -> Tensor:
        return (0.5 + torch.rand(*leading, M, generator=generator, device=generator.device)).to(state_dtype)

    if workload.op == "decode_heads":
        H = heads_of(workload)
        U, P = shape["U"], shape["P"]
        log_scale = 0.1 * normal(2, H)
        addresses = eager_decode_heads.separated(lambda: 2 * normal(N // H, 2, H, U, P), log_scale, K)
        projected = torch.cat([addresses.flatten(1), normal(N // H, H * D)], 1)
        position = M + 3 + torch.arange(N // H, device=generator.device)
        state = normal(N // H, H, M, D, dtype=state_dtype), mass_of(N // H, H)
        return projected, log_scale, position, *state, MixerOptions(U, P, K, H // 2, 1.0, decay_power, eps)

    leading = (1, N, shape["T"]) if "T" in shape else (1, N)
    sub_dim, order = _digits(M)

    def access() -> tuple[Tensor, Tensor]:
        return reference.address_decode(2 * normal(*leading, order, sub_dim), K)

    accesses = Accesses(*access(), *access())
    values, memory, mass = normal(*leading, D), normal(1, N, M, D, dtype=state_dtype), mass_of(1, N)
    step = (accesses, values, memory, mass, decay_power, eps)
    if workload.op == "memory_step":
        return step
    scan = (*step, constants.get("proxy_eps", 0.01))
    if workload.op == "memory_scan":
        return scan
    return (normal(*values.shape), *(normal(*x.shape, dtype=state_dtype) for x in (memory, mass))), *scan


def _digits(slots: int) -> tuple[int, int]:
    """Return P and U with P^U = M, for the smallest possible P ≥ 4, else M and 1."""
    for sub_dim in range(4, slots):
        order = round(torch.tensor(float(slots)).log().item() / torch.tensor(float(sub_dim)).log().item())
        if sub_dim**order == slots:
            return sub_dim, order
    return slots, 1


def _clone_state(workload: Workload, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with a copy of the state if the op updates it in place."""
    if workload.op not in IN_PLACE:
        return arguments
    where = IN_PLACE[workload.op]
    return *arguments[: where.start], *(x.clone() for x in arguments[where]), *arguments[where.stop :]


def _double(value: Any) -> Any:
    """Move a tensor to the CPU, in float64 if floating."""
    if not isinstance(value, Tensor):
        return value
    return value.double().cpu() if value.is_floating_point() else value.cpu()


def _weights_of(logits: Tensor, slots: Tensor) -> Tensor:
    """Return the product softmax of logits [R, U, P] at slots [R, K]; 0 for a slot out of range."""
    order, sub_dim = logits.shape[-2:]
    outside = (slots < 0) | (slots >= sub_dim**order)
    powers = sub_dim ** torch.arange(order, device=slots.device)
    digits = slots.long().masked_fill(outside, 0).unsqueeze(-2) // powers.unsqueeze(-1) % sub_dim  # [R, U, K]
    return logits.log_softmax(-1).gather(-1, digits).sum(-2).exp().masked_fill(outside, 0)


def _distinct(slots: Tensor) -> Tensor:
    """Count the distinct slots of each row of [R, K], [R]."""
    ordered = slots.sort(-1).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).double().sum(-1)


def relative_rmse(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    found, expected = _double(found), _double(expected)
    error, scale = float((found - expected).norm()), float(expected.norm())
    if error == 0:
        return 0.0
    return error / scale if scale > 0 and error == error else float("inf")
