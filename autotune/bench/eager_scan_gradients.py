"""The memory scan with gradients in eager PyTorch: by sorting, and with a manual backward.

Both have the arguments and results of ``ramnet.ops.memory_scan`` and use the proxy gradient (paper, step 7).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autotune.measure.eager_scan import CHUNK, Trace, flat_slots, time_first, time_last
from ramnet.ops.accesses import Accesses


def scan_sorted(  # noqa: PLR0913 - what ``ramnet.ops.memory_scan`` takes
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float = 1.0, eps: float = 1e-6, proxy_eps: float = 0.01, compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sort writes by slot and time, then run a segmented scan of (a, b)∘(a', b') = (a·a', a'·b + b') in autograd.

    A slot's first element is its initial state, with a = 0, so that no element depends on those before its segment. The
    scan doubles its reach until it spans the longest segment: 5 steps for uniform slots. ``compiled`` compiles all but
    the sort with torch.compile.
    """
    plan = sort_plan(write_slots, read_slots, memory)
    steps = int(plan.place.max()).bit_length()
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    scan = _compiled_scan() if compiled else _scan
    return scan(plan, steps, accesses, values, memory, mass, decay_power, eps, proxy_eps)


@cache
def _compiled_scan() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_scan)


class SortPlan(NamedTuple):
    """The permutation of the E = N·M + T·N·K elements, which depends on the slots only and has no gradient."""

    order: Tensor  # [E] sorted element → element
    place: Tensor  # [E] sorted element → its number within its segment
    seen: Tensor  # [T·N·K] read → the sorted element it sees
    last: Tensor  # [N·M] slot → its last sorted element


def sort_plan(write_slots: Tensor, read_slots: Tensor, memory: Tensor) -> SortPlan:
    """Sort the slots' initial rows and the writes by (slot, time)."""
    write_at, read_at = flat_slots(write_slots, memory), flat_slots(read_slots, memory)  # [T, N·K]
    tokens, rows = write_at.shape[0], memory.shape[:3].numel()
    device = memory.device
    times = torch.arange(1, tokens + 1, device=device).unsqueeze(1)
    first = torch.arange(rows, device=device) * (tokens + 1)
    keys, order = torch.cat([first, (write_at * (tokens + 1) + times).flatten()]).sort()
    begin = torch.searchsorted(keys, first)
    place = torch.arange(len(keys), device=device) - begin[keys // (tokens + 1)]
    seen = torch.searchsorted(keys, (read_at * (tokens + 1) + times).flatten(), right=True) - 1
    last = torch.cat([begin[1:], begin.new_tensor([len(keys)])]) - 1
    return SortPlan(order, place, seen, last)


def _scan(
    plan: SortPlan, steps: int, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float, eps: float, proxy_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    w, r = time_first(accesses.write_weights), time_first(accesses.read_weights)  # [T, N, K]
    v = torch.nn.functional.pad(time_first(values), (0, 1), value=1.0)  # [T, N, D + 1]: the mass is a column
    proxy = (proxy_eps + (1 - proxy_eps) * (1 - w)) ** decay_power
    decay = proxy + ((1 - w) ** decay_power - proxy).detach()
    state = torch.cat([memory, mass.unsqueeze(-1)], -1).flatten(0, 2)  # [N·M, D + 1]
    a = torch.cat([state.new_zeros(state.shape[0]), decay.flatten()])
    b = torch.cat([state, (w.unsqueeze(-1) * v.unsqueeze(2)).flatten(0, 2)])
    a, b = a.index_select(0, plan.order), b.index_select(0, plan.order)
    for step in range(steps):
        reach = 1 << step
        # An element takes nothing from beyond its segment.
        within = torch.where(plan.place[reach:] >= reach, a[reach:], 0.0)
        b = torch.cat([b[:reach], torch.addcmul(b[reach:], within.unsqueeze(1), b[:-reach])])
        a = torch.cat([a[:reach], within * a[:-reach]])
    seen = b.index_select(0, plan.seen).view(*r.shape, -1)  # [T, N, K, D + 1]
    scaled = r / (seen[..., -1] + eps)
    output = torch.matmul(scaled.unsqueeze(2), seen[..., :-1]).squeeze(2)
    final = b.index_select(0, plan.last)
    return time_last(output, values.shape), final[:, :-1].reshape(memory.shape), final[:, -1].reshape(mass.shape)


class ScanChunked(torch.autograd.Function):
    """``eager_scan.scan_chunked`` with a backward over saved rows in reverse; the fastest form found.

    It saves, for each access, the row that a write replaced or that a read used.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - as ``ramnet.ops.memory_scan``; autograd sees no tensor inside a tuple
        ctx: Any, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
        values: Tensor, memory: Tensor, mass: Tensor,
        decay_power: float = 1.0, eps: float = 1e-6, proxy_eps: float = 0.01,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        trace = Trace(write_slots, write_weights, read_slots, read_weights, values, memory, mass, decay_power)
        tokens = values.shape[2]
        replaced, seen, new = trace.empty_rows(tokens), trace.empty_rows(tokens), trace.empty_rows(CHUNK)
        output = values.new_empty(tokens, trace.v.shape[1], values.shape[3])
        for begin in range(0, tokens, CHUNK):
            chunk = trace.write_and_read(begin, replaced[begin:], new, seen[begin:])
            output[chunk] = trace.read_out(chunk, seen[begin:], eps)
        ctx.trace, ctx.replaced, ctx.seen = trace, replaced, seen
        ctx.weights_shape = write_weights.shape
        ctx.decay_power, ctx.eps, ctx.proxy_eps = decay_power, eps, proxy_eps
        return time_last(output, values.shape), *trace.final()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trace: Trace = ctx.trace
        w, r, v = trace.w, trace.r, trace.v
        grad_output, grad_memory, grad_mass = grads
        grad_out = time_first(grad_output)  # [T, N, D]
        grad_state = torch.cat([grad_memory, grad_mass.unsqueeze(-1)], -1).flatten(0, 2)
        slope = -ctx.decay_power * (1 - ctx.proxy_eps)
        slope = slope * (ctx.proxy_eps + (1 - ctx.proxy_eps) * (1 - w)) ** (ctx.decay_power - 1)
        grad_w, grad_r, grad_v = torch.empty_like(w), torch.empty_like(r), torch.empty_like(grad_out)
        grad_seen, grad_rows = trace.empty_rows(CHUNK), trace.empty_rows(CHUNK)
        decayed = torch.empty_like(grad_rows[0])
        rows_of = (-1, *w.shape[1:], v.shape[-1])
        for begin in reversed(range(0, len(v), CHUNK)):
            chunk = slice(begin, min(begin + CHUNK, len(v)))
            count = chunk.stop - begin
            seen, spread = ctx.seen[chunk].view(rows_of), grad_seen[:count].view(rows_of)  # [C, N, K, D + 1]
            inverse = 1 / (seen[..., -1] + ctx.eps)
            along = torch.matmul(seen[..., :-1], grad_out[chunk].unsqueeze(-1)).squeeze(-1)
            grad_r[chunk] = along * inverse
            scaled = r[chunk] * inverse
            torch.mul(scaled.unsqueeze(-1), grad_out[chunk].unsqueeze(2), out=spread[..., :-1])
            spread[..., -1] = -along * scaled * inverse
            for i in reversed(range(count)):
                t = begin + i
                grad_state.index_add_(0, trace.read_at[t], grad_seen[i])
                torch.index_select(grad_state, 0, trace.write_at[t], out=grad_rows[i])
                grad_state.index_copy_(0, trace.write_at[t], torch.mul(grad_rows[i], trace.decay[t], out=decayed))
            rows = grad_rows[:count].view(rows_of)
            torch.matmul(w[chunk].unsqueeze(2), rows[..., :-1], out=grad_v[chunk].unsqueeze(2))
            grad_w[chunk] = torch.matmul(rows, v[chunk].unsqueeze(-1)).squeeze(-1)
            grad_w[chunk] += (rows * ctx.replaced[chunk].view(rows_of)).sum(-1) * slope[chunk]
        shape = grad_memory.shape
        return (
            None, time_last(grad_w, ctx.weights_shape), None, time_last(grad_r, ctx.weights_shape),
            time_last(grad_v, grad_output.shape),
            grad_state[:, :-1].reshape(shape), grad_state[:, -1].reshape(shape[:3]),
            None, None, None,
        )  # fmt: skip
