"""The sparse memory ops: the interface between the model and the kernels.

``address_decode`` turns logits into K addresses, ``memory_scan`` writes and reads the memory for a sequence,
``memory_step`` does so for one token in place, and ``cyclic_shift`` is CAPE. They run on a plain PyTorch reference, or
on the kernels of the backend that ``using`` selects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramnet.ops import checks, library, packed
from ramnet.ops.accesses import Accesses
from ramnet.ops.backend import active, keeping, register_backend, registered, using

__all__ = [
    "Accesses", "address_decode", "cyclic_shift", "keeping", "memory_scan", "memory_step", "register_backend",
    "registered", "using",
]  # fmt: skip


def address_decode(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the K largest of the M = P^U entries of the product softmax, without computing all M (paper, steps 2 and 3).

    Args:
        logits: [..., U, P], any floating dtype; sub-vector 0 is the least significant digit of the slot number.
        top_k: K, from 1 to P^U.

    Returns:
        slots, int32 [..., K], and weights, [..., K] of the dtype of ``logits``, in descending order of weight. Weights
        are not renormalised; they are differentiable in ``logits``. Ties are broken arbitrarily.

    Raises:
        ValueError: if K is not in 1..P^U, P^U exceeds int32, or ``logits`` has fewer than two dimensions. The
            reference, and kernels that ``check``, also raise it for NaN, +inf, and a sub-vector of -inf alone (a
            single -inf excludes its digit).
        TypeError: if ``logits`` is not floating or K is not an int.
    """
    checks.address_decode(logits, top_k)
    weights, slots = library.address_decode(logits, top_k, active())
    return slots, weights


def memory_scan(  # noqa: PLR0913 - the op of torch.library as users know it, a tensor an argument
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
    cu_seqlens: Tensor | None = None,
    in_range: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each token in turn, write K slots of the memory and then read K slots (paper, steps 5 to 7).

    Args:
        write_slots, read_slots: int32 [B, H, T, K], distinct within a token, in 0..M-1.
        write_weights, read_weights: [B, H, T, K], of one floating dtype; write weights are in 0..1.
        values: [B, H, T, D], floating.
        memory, mass: the state before the first token, [B, H, M, D] and [B, H, M], of one floating dtype.
        decay_power: γ ≥ 0.
        eps: ε > 0.
        proxy_eps: ε' in (0, 1], which only the gradient uses.
        cu_seqlens: int64 [R + 1], for B = 1 and R documents one after another: the offset at which each document
            begins, then T. Each document has a state of its own, so that R takes the place of B in ``memory`` and
            ``mass``. Its values are read, which synchronises with a GPU.
        in_range: skip the check of the slots on a GPU, as slots of ``address_decode`` are always in range.

    Returns:
        output [B, H, T, D] of the dtype of ``values``, and the new memory and mass. They are differentiable in the
        weights, the values, ``memory`` and ``mass``. Sums are float32, or float64 if an input is.

    Raises:
        ValueError: if shapes or devices do not match, K > M, γ, ε or ε' is out of range, or a slot is out of range.
            The reference, and kernels that ``check``, also raise it for slots repeated within a token. Kernels on a
            GPU report slots out of range by a device-side assertion, as torch's indexing does.
        TypeError: if an argument has a wrong dtype.
    """
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    if cu_seqlens is None:
        each_memory, each_mass = memory, mass
    else:
        checks.documents(cu_seqlens, values, memory, mass)
        each_memory, each_mass = memory[:1], mass[:1]
    checks.memory_scan(accesses, values, each_memory, each_mass, decay_power, eps, proxy_eps)
    _check_range(accesses, memory, in_range)
    tensors = (*accesses, values, memory, mass)
    constants = (float(decay_power), float(eps), float(proxy_eps), active())
    if cu_seqlens is None:
        return library.memory_scan(*tensors, *constants)
    return packed.memory_scan_packed(*tensors, cu_seqlens, *constants)


def memory_step(  # noqa: PLR0913 - as memory_scan
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
    """Run one token of ``memory_scan``, updating ``memory`` and ``mass`` in place, in time O(K·D) for any M.

    The arguments are those of ``memory_scan`` without the dimension T. ``memory`` and ``mass`` must be contiguous.
    Returns output [B, H, D] of the dtype of ``values``. Raises as ``memory_scan`` does, and ValueError if gradients are
    asked for, which it does not compute.
    """
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    checks.memory_step(accesses, values, memory, mass, decay_power, eps)
    _check_range(accesses, memory, in_range)
    return library.memory_step(*accesses, values, memory, mass, float(decay_power), float(eps), active())


def _check_range(accesses: Accesses[Tensor], memory: Tensor, in_range: bool) -> None:
    """Check the slots for kernels on a GPU; kernels on a CPU and the reference check them themselves."""
    if memory.is_cuda and active() and not in_range:
        checks.slots_in_range_on_device(accesses, memory.shape[2])


def cyclic_shift(slots: Tensor, position: int | Tensor, num_slots: int) -> Tensor:
    """Apply CAPE (paper, step 4): slot j at position t becomes (j − t) mod M.

    Args:
        slots: integer tensor of any shape.
        position: t, an int or an integer tensor that broadcasts against ``slots``.
        num_slots: M > 0.

    Returns:
        int32, of the broadcast shape.

    Raises:
        ValueError: if ``num_slots`` is below 1.
        TypeError: if ``slots`` or ``position`` is not of an integer dtype.
    """
    checks.cyclic_shift(slots, position, num_slots)
    # int64, as a position may exceed 2^31.
    return torch.remainder(slots.to(torch.int64) - position, num_slots).to(torch.int32)
