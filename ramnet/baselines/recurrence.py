"""The linear recurrence that the baselines with a fixed-size state share, computed a chunk of tokens at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ramnet.baselines import flash_linear_attention

CHUNK = 16
BLOCK = 8  # tokens of a chunk that are multiplied at once if each channel has a decay of its own


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    removed: Tensor | None = None,
    replaced: Tensor | None = None,
) -> Tensor:
    """Compute o_t = S_t q_t of S_t = S_(t−1) (Diag(w_t) + a_t b_tᵀ) + v_t k_tᵀ with S_0 = 0.

    On a GPU, flash-linear-attention's kernels compute it if they are installed and take its dtype.

    Args:
        query: q, [B, H, T, K].
        key: k, [B, H, T, K].
        value: v, [B, H, T, V].
        log_decay: ln w, [B, H, T, K] or [B, H, T, 1]; None for w = 1. A w below the dtype's eps is taken for eps;
            float16 is computed in float32, whose eps it is then.
        removed: a, [B, H, T, K]; None without the term a bᵀ.
        replaced: b, [B, H, T, K].

    Returns:
        o, [B, H, T, V].
    """
    batch, heads, tokens, width = query.shape
    if not tokens:
        return torch.zeros_like(value)
    by_library = flash_linear_attention.applies(value, removed)
    if value.dtype == torch.float16 and not by_library:  # whose range does not hold products of decays within a block
        given = (query, key, value, log_decay, removed, replaced)
        return linear_recurrence(*(x if x is None else x.float() for x in given)).half()  # type: ignore[arg-type]
    if log_decay is None:
        log_decay = query.new_zeros(batch, heads, tokens, 1)
    # A state times less than eps is lost in rounding, and e^(−G) of such decays would overflow within a block.
    log_decay = log_decay.clamp(min=math.log(torch.finfo(log_decay.dtype).eps))
    if by_library:
        return flash_linear_attention.linear_recurrence(query, key, value, log_decay, removed, replaced)
    reads, writes = [query], [key]
    if removed is not None and replaced is not None:
        reads, writes = [query, removed], [key, replaced]
    parts = [torch.stack(reads, dim=2), torch.stack(writes, dim=2), value, log_decay]
    padded = (F.pad(x, (0, 0, 0, -tokens % CHUNK)) for x in parts)
    state = query.new_zeros(batch, heads, width, value.shape[-1])  # Sᵀ
    outputs = []
    for chunk in zip(*(x.split(CHUNK, dim=-2) for x in padded), strict=True):
        output, state = _chunk(state, *chunk)
        outputs.append(output)
    return torch.cat(outputs, dim=2)[:, :, :tokens]


def _chunk(state: Tensor, reads: Tensor, writes: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of a chunk and the state after it.

    With G the running sum of ln w, S_t = S_0 e^(G_t) + Σ_(s ≤ t) (v_s k_sᵀ + u_s b_sᵀ) e^(G_t − G_s), where u_t =
    S_(t−1) a_t solves a triangular system. ``reads`` are q, or q and a, and ``writes`` k, or k and b: [B, H, N, T, K].
    """
    total = log_decay.cumsum(dim=2)  # G
    seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    at, mask = total.unsqueeze(2), seen.unsqueeze(0)
    if reads.shape[2] == 2:  # a reads the state before the token's own write
        at, mask = torch.stack([total, total - log_decay], dim=2), torch.stack([seen, seen.tril(-1)])
    scores = _scores(reads, at, writes, total.unsqueeze(2), mask.unsqueeze(2))
    known = ((reads * at.exp()).flatten(2, 3) @ state).unflatten(2, (-1, CHUNK))  # of the chunk's first state
    written = v
    if reads.shape[2] == 2:
        unit = torch.eye(CHUNK, dtype=v.dtype, device=v.device) - scores[:, :, 1, :, 1]
        right = known[:, :, 1] + scores[:, :, 1, :, 0] @ v
        wide = torch.promote_types(v.dtype, torch.float32)  # there is no solver for bfloat16
        u = torch.linalg.solve_triangular(unit.to(wide), right.to(wide), upper=False, unitriangular=True).to(v.dtype)
        written = torch.cat([v, u], dim=2)
    last = total[:, :, -1:]
    kept = (writes * (last - total).exp().unsqueeze(2)).flatten(2, 3)
    output = known[:, :, 0] + scores[:, :, 0].flatten(3, 4) @ written
    return output, torch.addcmul(kept.mT @ written, state, last.exp().mT)


def _scores(reads: Tensor, at: Tensor, writes: Tensor, since: Tensor, mask: Tensor) -> Tensor:
    """Return Σ_k reads_t writes_s e^(at_t − since_s) where ``mask`` [N, t, 1, s], else 0, as [B, H, N, T, N, T]."""
    if at.shape[-1] == 1:
        gap = torch.where(mask, (at - since.mT).unsqueeze(4), -torch.inf)
        return _products(reads, writes) * gap.exp()
    columns = []
    for s in range(0, CHUNK, BLOCK):
        block = slice(s, s + BLOCK)
        # With G in the middle of the block between them, no factor of e^(at_t − since_s) overflows.
        middle = since[:, :, :, s + BLOCK // 2 - 1].unsqueeze(3)
        earlier = writes[:, :, :, block] * (middle - since[:, :, :, block]).exp()
        later = reads[:, :, :, s:] * (at[:, :, :, s:] - middle).exp()
        columns.append(F.pad(_products(later, earlier), (0, 0, 0, 0, s, 0)))
    return torch.where(mask, torch.cat(columns, dim=-1), 0)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_k left [B, H, N, t, k] right [B, H, N, s, k] of all pairs, [B, H, N, t, N, s]."""
    products = left.flatten(2, 3) @ right.flatten(2, 3).mT
    return products.unflatten(3, right.shape[2:4]).unflatten(2, left.shape[2:4])
