"""The linear recurrence that the baselines with a fixed-size state share, computed a chunk of tokens at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
# Of decays of channels: tokens whose pairs are computed one by one, instead of by a matrix product.
BLOCK = 4


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    removed: Tensor | None = None,
    replaced: Tensor | None = None,
) -> Tensor:
    """Compute o_t = S_t q_t of S_t = S_(t−1) (Diag(w_t) + a_t b_tᵀ) + v_t k_tᵀ with S_0 = 0.

    Args:
        query: q, [B, H, T, K].
        key: k, [B, H, T, K].
        value: v, [B, H, T, V].
        log_decay: ln w, [B, H, T, K] or [B, H, T, 1]; None for w = 1.
        removed: a, [B, H, T, K]; None without the term a bᵀ.
        replaced: b, [B, H, T, K].

    Returns:
        o, [B, H, T, V].
    """
    batch, heads, tokens, width = query.shape
    if log_decay is None:
        log_decay = query.new_zeros(batch, heads, tokens, 1)
    parts = [query, key, value, log_decay, *(x for x in (removed, replaced) if x is not None)]
    padded = (F.pad(x, (0, 0, 0, -tokens % CHUNK)) for x in parts)
    state = query.new_zeros(batch, heads, width, value.shape[-1])  # Sᵀ
    outputs = []
    for chunk in zip(*(x.split(CHUNK, dim=2) for x in padded), strict=True):
        output, state = _chunk(state, *chunk)
        outputs.append(output)
    return torch.cat(outputs, dim=2)[:, :, :tokens]


def _chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the outputs of a chunk and the state after it.

    With G the running sum of ln w, S_t = S_0 e^(G_t) + Σ_(s ≤ t) (u_s b_sᵀ + v_s k_sᵀ) e^(G_t − G_s), where u_t =
    S_(t−1) a_t solves a triangular system.
    """
    total = log_decay.cumsum(dim=2)  # G
    before = total - log_decay  # G_(t−1)
    seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    last = total[:, :, -1:]
    output = (q * total.exp()) @ state + _scores(q, total, k, total, seen) @ v
    new = state * last.exp().mT + (k * (last - total).exp()).mT @ v
    if a is not None and b is not None:
        earlier = seen.tril(-1)
        known = (a * before.exp()) @ state + _scores(a, before, k, total, earlier) @ v
        unit = torch.eye(CHUNK, dtype=q.dtype, device=q.device) - _scores(a, before, b, total, earlier)
        wide = torch.promote_types(q.dtype, torch.float32)  # there is no solver for bfloat16
        u = torch.linalg.solve_triangular(unit.to(wide), known.to(wide), upper=False, unitriangular=True).to(q.dtype)
        output = output + _scores(q, total, b, total, seen) @ u
        new = new + (b * (last - total).exp()).mT @ u
    return output, new


def _scores(left: Tensor, at: Tensor, right: Tensor, since: Tensor, mask: Tensor) -> Tensor:
    """Return Σ_k left_t right_s e^(at_t − since_s) where ``mask`` [t, s], else 0."""
    if at.shape[-1] == 1:
        gap = torch.where(mask, at - since.mT, -torch.inf)
        return (left @ right.mT) * gap.exp()
    columns = []
    for s in range(0, CHUNK, BLOCK):
        block, after = slice(s, s + BLOCK), slice(s + BLOCK, CHUNK)
        # G falls, so that neither factor of e^(at_t − since_s) exceeds 1 with the block's last G between them.
        end = since[:, :, s + BLOCK - 1 : s + BLOCK]
        below = left[:, :, after] * (at[:, :, after] - end).exp()
        below = below @ (right[:, :, block] * (end - since[:, :, block]).exp()).mT
        gap = at[:, :, block, None] - since[:, :, None, block]
        gap = torch.where(mask[block, block, None], gap, -torch.inf)
        inside = torch.einsum("bhtk,bhsk,bhtsk->bhts", left[:, :, block], right[:, :, block], gap.exp())
        columns.append(F.pad(torch.cat([inside, below], dim=2), (0, 0, s, 0)))
    return torch.cat(columns, dim=3)
