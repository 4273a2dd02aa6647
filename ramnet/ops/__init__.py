"""The sparse memory ops: the contract between the model and whatever computes it.

``address_decode`` turns logits into K addresses, ``memory_scan`` writes and reads a sequence, ``memory_step`` one
token in place, ``cyclic_shift`` is CAPE. Each runs on a plain PyTorch reference, or on the kernels of the backend
that ``using`` names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramnet.ops import checks, library
from ramnet.ops.backend import active, register_backend, registered, using

__all__ = [
    "address_decode", "cyclic_shift", "memory_scan", "memory_step", "register_backend", "registered", "using",
]  # fmt: skip


def address_decode(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest entries of the product softmax, without building its M entries (paper, steps 2 and 3).

    Args:
        logits: [..., U, P], any floating type; sub-vector 0 is the least significant digit of the slot.
        top_k: K, from 1 to P^U.

    Returns:
        slots int32 [..., K] and weights [..., K], descending, of the type of ``logits``. Weights are not
        renormalised. Differentiable in ``logits``; ties fall either way.

    Raises:
        ValueError: for K outside 1..P^U, P^U past int32, fewer than two dimensions, or logits that no softmax can
            take (NaN or +inf; -inf rules a digit out).
        TypeError: for logits that are not floating or a K that is no int.
    """
    checks.address_decode(logits, top_k)
    weights, slots = library.address_decode(logits, top_k, active())
    return slots, weights


def memory_scan(
    write_slots: Tensor,
    write_weights: Tensor,
    read_slots: Tensor,
    read_weights: Tensor,
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float = 1.0,
    eps: float = 1e-6,
    proxy_eps: float = 0.01,
    *,
    in_range: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write, then read, K slots for each token in turn (paper, steps 5 to 7).

    Args:
        write_slots, read_slots: int32 [B, H, T, K], distinct within a token, in 0..M-1.
        write_weights, read_weights: [B, H, T, K], writes in 0..1; one floating type for both.
        values: [B, H, T, D], floating.
        memory, mass: the state before, [B, H, M, D] and [B, H, M]; one floating type for both.
        decay_power: γ ≥ 0. eps: ε > 0. proxy_eps: ε' in (0, 1], used by the gradient alone.
        in_range: the slots are known to be, as those of ``address_decode`` are, so a GPU need not look at them.

    Returns:
        output [B, H, T, D] of the type of ``values``, and the new memory and mass. Differentiable in the weights,
        the values and the state before. Sums are float32 (float64 where an input is).

    Raises:
        ValueError: for shapes or devices that do not fit, K > M, γ < 0, ε or ε' outside their ranges, and slots out of
            range; on the reference, and on kernels that ``check``, also slots repeated within a token.
        TypeError: for wrong types.

    On a GPU's kernels slots out of range are a device-side assertion, as in torch's own indexing.
    """
    checks.memory_scan(
        write_slots, write_weights, read_slots, read_weights, values, memory, mass, decay_power, eps, proxy_eps
    )
    _check_range(write_slots, read_slots, memory, in_range)
    return library.memory_scan(
        write_slots, write_weights, read_slots, read_weights, values, memory, mass,
        float(decay_power), float(eps), float(proxy_eps), active(),
    )  # fmt: skip


def memory_step(
    write_slots: Tensor,
    write_weights: Tensor,
    read_slots: Tensor,
    read_weights: Tensor,
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float = 1.0,
    eps: float = 1e-6,
    *,
    in_range: bool = False,
) -> Tensor:
    """One token of ``memory_scan``, updating ``memory`` and ``mass`` in place; O(K·D) whatever M is.

    Shapes are those of ``memory_scan`` without T; the state must be contiguous. Returns output [B, H, D] of the
    type of ``values``. Not differentiable. Raises as ``memory_scan`` does.
    """
    checks.memory_step(write_slots, write_weights, read_slots, read_weights, values, memory, mass, decay_power, eps)
    _check_range(write_slots, read_slots, memory, in_range)
    return library.memory_step(
        write_slots, write_weights, read_slots, read_weights, values, memory, mass,
        float(decay_power), float(eps), active(),
    )  # fmt: skip


def _check_range(write_slots: Tensor, read_slots: Tensor, memory: Tensor, in_range: bool) -> None:
    """Before a GPU's kernels; a CPU's look themselves, and so does the reference."""
    if memory.is_cuda and active() and not in_range:
        for name, slots in (("write_slots", write_slots), ("read_slots", read_slots)):
            checks.slots_in_range_on_device(name, slots, memory.shape[2])


def cyclic_shift(slots: Tensor, position: int | Tensor, num_slots: int) -> Tensor:
    """CAPE (paper, step 4): slot j at position t becomes (j − t) mod M.

    Args:
        slots: integer, any shape. position: an int, or an integer tensor that broadcasts against ``slots``.
        num_slots: M > 0.

    Returns:
        int32, of the broadcast shape.

    Raises:
        ValueError: for num_slots below 1.
        TypeError: for slots or a position that are not integers.
    """
    checks.cyclic_shift(slots, position, num_slots)
    # int64: a position may be past 2^31.
    return torch.remainder(slots.to(torch.int64) - position, num_slots).to(torch.int32)
