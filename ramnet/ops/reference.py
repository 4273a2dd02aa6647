"""Plain PyTorch definitions of the ops, which every kernel must match.

Sums are float32, or float64 if an input is. Shapes are those of ``ramnet.ops``; internally B·H is flattened to N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramnet.ops import checks
from ramnet.ops.accesses import Accesses


def address_decode(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Search the top K one sub-vector at a time (paper, step 3). It suffices to keep the best K prefixes, because a
    suffix adds the same log-probability to each."""
    checks.logits_are_numbers(logits)
    order, sub_dim = logits.shape[-2:]
    log_p = logits.to(sum_type(logits)).log_softmax(dim=-1)  # [..., U, P]
    digits = torch.arange(sub_dim, device=logits.device)
    best = log_p.new_zeros(*logits.shape[:-2], 1)
    slots = torch.zeros(best.shape, dtype=torch.int64, device=logits.device)
    for u in range(order):
        scores = (best.unsqueeze(-1) + log_p[..., u, :].unsqueeze(-2)).flatten(-2)
        prefixes = (slots.unsqueeze(-1) + digits * sub_dim**u).flatten(-2)
        best, chosen = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
        slots = prefixes.gather(-1, chosen)
    return slots.to(torch.int32), best.exp().to(logits.dtype)


def address_decode_backward(grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """∂w_k/∂logit[u, p] = w_k · ([digit_u(slot_k) = p] − softmax_u[p])."""
    order, sub_dim = logits.shape[-2:]
    dtype = sum_type(logits)
    scaled = grad_weights.to(dtype) * weights.to(dtype)  # [..., K]
    powers = sub_dim ** torch.arange(order, device=logits.device)
    digit = slots.to(torch.int64).unsqueeze(-2) // powers.unsqueeze(-1) % sub_dim  # [..., U, K]
    hits = torch.zeros(logits.shape, dtype=dtype, device=logits.device)
    hits.scatter_add_(-1, digit, scaled.unsqueeze(-2).expand_as(digit))
    softmax = logits.to(dtype).softmax(dim=-1)
    return (hits - softmax * scaled.sum(-1)[..., None, None]).to(logits.dtype)


def memory_scan(
    accesses: Accesses[Tensor],
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float,
    eps: float,
    proxy_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of the paper's steps 5 and 6 as a loop over tokens. ``proxy_eps`` affects the backward only."""
    checks.slots_are_valid(accesses, memory.shape[2])
    write_slots, write_weights, read_slots, read_weights = accesses
    dtype = sum_type(values, write_weights, memory)
    write_at, read_at = _flat_slots(write_slots, memory), _flat_slots(read_slots, memory)
    w, r, v = (_time_first(x, dtype) for x in (write_weights, read_weights, values))
    state = memory.to(dtype, copy=True).reshape(-1, memory.shape[-1])  # [N·M, D]
    z = mass.to(dtype, copy=True).reshape(-1)  # [N·M]
    decay = (1 - w) ** decay_power
    output = torch.empty_like(v)  # [T, N, D]
    for t in range(v.shape[0]):
        rows = _rows(state, write_at[t])
        state.index_copy_(0, write_at[t].flatten(), _write(rows, decay[t], w[t], v[t]).flatten(0, 1))
        z[write_at[t]] = decay[t] * z[write_at[t]] + w[t]
        scaled = r[t] / (z[read_at[t]] + eps)
        output[t] = (scaled.unsqueeze(-1) * _rows(state, read_at[t])).sum(1)
    return (
        _time_last(output, values),
        state.reshape(memory.shape).to(memory.dtype),
        z.reshape(mass.shape).to(mass.dtype),
    )


def memory_scan_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    accesses: Accesses[Tensor],
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float,
    eps: float,
    proxy_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of write_weights, read_weights, values, memory and mass, from those of output, memory and mass.

    The tokens are run forward again, saving the rows and masses that each write replaces. The backward then visits the
    tokens in reverse and restores those rows, as the decay may be 0 and cannot be inverted. The derivative of the decay
    is the proxy's, −γ(1 − ε')(ε' + (1 − ε')(1 − w))^(γ−1) (paper, step 7).
    """
    grad_output, grad_memory, grad_mass = grads
    write_slots, write_weights, read_slots, read_weights = accesses
    dtype = sum_type(values, write_weights, memory)
    write_at, read_at = _flat_slots(write_slots, memory), _flat_slots(read_slots, memory)
    w, r, v, grad_out = (_time_first(x, dtype) for x in (write_weights, read_weights, values, grad_output))
    state = memory.to(dtype, copy=True).reshape(-1, memory.shape[-1])
    z = mass.to(dtype, copy=True).reshape(-1)
    decay = (1 - w) ** decay_power
    decay_slope = -decay_power * (1 - proxy_eps) * (proxy_eps + (1 - proxy_eps) * (1 - w)) ** (decay_power - 1)
    tokens = range(v.shape[0])
    replaced: list[tuple[Tensor, Tensor]] = []
    for t in tokens:
        rows, masses = _rows(state, write_at[t]), z[write_at[t]]
        replaced.append((rows, masses))
        state.index_copy_(0, write_at[t].flatten(), _write(rows, decay[t], w[t], v[t]).flatten(0, 1))
        z[write_at[t]] = decay[t] * masses + w[t]

    grad_state = grad_memory.to(dtype, copy=True).reshape(-1, memory.shape[-1])
    grad_z = grad_mass.to(dtype, copy=True).reshape(-1)
    grad_w, grad_r, grad_v = torch.empty_like(w), torch.empty_like(r), torch.empty_like(v)
    for t in reversed(tokens):
        inverse = 1 / (z[read_at[t]] + eps)  # [N, K]
        along = (_rows(state, read_at[t]) * grad_out[t].unsqueeze(1)).sum(-1)
        grad_r[t] = along * inverse
        grad_z[read_at[t]] -= along * r[t] * inverse**2
        spread = (r[t] * inverse).unsqueeze(-1) * grad_out[t].unsqueeze(1)  # [N, K, D]
        grad_state.index_add_(0, read_at[t].flatten(), spread.flatten(0, 1))

        rows, masses = replaced[t]
        grad_rows, grad_masses = _rows(grad_state, write_at[t]), grad_z[write_at[t]]
        grad_v[t] = (w[t].unsqueeze(-1) * grad_rows).sum(1)
        grad_decay = (grad_rows * rows).sum(-1) + grad_masses * masses
        grad_w[t] = (grad_rows * v[t].unsqueeze(1)).sum(-1) + grad_masses + grad_decay * decay_slope[t]
        grad_state.index_copy_(0, write_at[t].flatten(), (decay[t].unsqueeze(-1) * grad_rows).flatten(0, 1))
        grad_z[write_at[t]] = decay[t] * grad_masses
        state.index_copy_(0, write_at[t].flatten(), rows.flatten(0, 1))
        z[write_at[t]] = masses
    return (
        _time_last(grad_w, write_weights),
        _time_last(grad_r, read_weights),
        _time_last(grad_v, values),
        grad_state.reshape(memory.shape).to(memory.dtype),
        grad_z.reshape(mass.shape).to(mass.dtype),
    )


def memory_step(
    accesses: Accesses[Tensor],
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float,
    eps: float,
) -> Tensor:
    """One token of ``memory_scan``; only the addressed rows of ``memory`` and ``mass`` are accessed, in place."""
    checks.slots_are_valid(accesses, memory.shape[2])
    write_slots, write_weights, read_slots, read_weights = accesses
    dtype = sum_type(values, write_weights, memory)
    write_at = _flat_slots(write_slots.unsqueeze(2), memory)[0]
    read_at = _flat_slots(read_slots.unsqueeze(2), memory)[0]
    w, r, v = (x.to(dtype).flatten(0, 1) for x in (write_weights, read_weights, values))
    state, z = memory.view(-1, memory.shape[-1]), mass.view(-1)
    decay = (1 - w) ** decay_power
    rows = _write(_rows(state, write_at).to(dtype), decay, w, v)
    state.index_copy_(0, write_at.flatten(), rows.flatten(0, 1).to(state.dtype))
    z[write_at] = (decay * z[write_at] + w).to(z.dtype)
    scaled = r / (z[read_at] + eps)
    output = (scaled.unsqueeze(-1) * _rows(state, read_at)).sum(1)
    return output.reshape(values.shape).to(values.dtype)


def sum_type(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which the reference and the kernels sum: float64 if an input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _flat_slots(slots: Tensor, memory: Tensor) -> Tensor:
    """Convert slots [B, H, T, K] to row numbers [T, N, K] of the flat state [N·M, D]."""
    batch, heads, num_slots = memory.shape[:3]
    base = torch.arange(batch * heads, device=slots.device).view(-1, 1, 1) * num_slots
    return (slots.to(torch.int64).flatten(0, 1) + base).transpose(0, 1).contiguous()


def _time_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert [B, H, T, X] to [T, N, X]."""
    return tensor.to(dtype).flatten(0, 1).transpose(0, 1).contiguous()


def _time_last(tensor: Tensor, like: Tensor) -> Tensor:
    """Convert [T, N, X] to the shape and dtype of ``like``, [B, H, T, X]."""
    return tensor.transpose(0, 1).reshape(like.shape).to(like.dtype).contiguous()


def _rows(state: Tensor, at: Tensor) -> Tensor:
    """Gather the rows ``at`` [N, K] of the flat state as [N, K, D]."""
    return state.index_select(0, at.flatten()).view(*at.shape, state.shape[-1])


def _write(rows: Tensor, decay: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Compute decay·row + w·v for rows [N, K, D], decay and weights [N, K], and values [N, D]."""
    return decay.unsqueeze(-1) * rows + weights.unsqueeze(-1) * values.unsqueeze(1)
