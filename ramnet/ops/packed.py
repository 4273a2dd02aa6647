"""``memory_scan`` of documents packed one after another into one row, each with a state of its own.

It is a custom op because the lengths of the documents are values, which a graph of torch.compile cannot read. Kernels
run on groups of documents of similar lengths, padded with writes and reads of weight 0, which change neither memory nor
mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ramnet.ops import library
from ramnet.ops.accesses import Accesses


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Group the indices of sequences such that padding at most doubles the tokens of a group.

    Groups are ordered by length, longest first, and indices within a group ascend. An empty sequence counts as one
    token. There are at most log2(longest) + 1 groups.
    """
    groups: list[list[int]] = []
    longest = held = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = max(1, lengths[i])
        if not groups or longest * (len(groups[-1]) + 1) > 2 * (held + length):
            groups.append([])
            longest, held = length, 0
        groups[-1].append(i)
        held += length
    return [sorted(group) for group in groups]


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless ``cu_seqlens`` ascends from 0 to ``tokens``; synchronises with a GPU."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to {tokens}")
    for before, after in pairwise(bounds):
        if after < before:
            raise ValueError(f"cu_seqlens falls from {before} to {after}; it must be ascending")


class _Group(NamedTuple):
    """R documents of at most L tokens.

    Attributes:
        rows: int64 [R], the documents' indices.
        source: int64 [R, L], the index of each token in the row; any valid index beyond the end.
        inside: bool [R, L], False beyond the end.
    """

    rows: Tensor
    source: Tensor
    inside: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Convert [1, H, T, X] to [R, H, L, X]."""
        return (
            x[0].transpose(0, 1).index_select(0, self.source.flatten()).unflatten(0, self.source.shape).transpose(1, 2)
        )

    def gather_zeros(self, x: Tensor) -> Tensor:
        """Convert as ``gather`` does, with zeros beyond the ends."""
        return self.gather(x).masked_fill_(~self.inside[:, None, :, None], 0)

    def inputs(self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor) -> tuple[Tensor, ...]:
        """Return the seven tensors of ``library.memory_scan`` for these documents."""
        return (
            self.gather(accesses.write_slots), self.gather_zeros(accesses.write_weights),
            self.gather(accesses.read_slots), self.gather_zeros(accesses.read_weights), self.gather_zeros(values),
            memory[self.rows], mass[self.rows],
        )  # fmt: skip

    def scatter(self, part: Tensor, whole: Tensor) -> None:
        """Store [R, H, L, X] into [1, H, T, X]."""
        whole[0].transpose(0, 1)[self.source[self.inside]] = part.transpose(1, 2)[self.inside]


def _groups(cu_seqlens: Tensor, tokens: int, device: torch.device) -> list[_Group]:
    check_bounds(cu_seqlens, tokens)
    bounds = cu_seqlens.cpu()
    lengths = bounds.diff()
    found = []
    for group in alike(lengths.tolist()):
        rows = torch.tensor(group)
        steps = torch.arange(int(lengths[rows].max()))
        source = (bounds[rows].unsqueeze(1) + steps).clamp(max=tokens - 1)
        found.append(_Group(*(x.to(device) for x in (rows, source, steps < lengths[rows].unsqueeze(1)))))
    return found


@torch.library.custom_op("ramnet::memory_scan_packed", mutates_args=())
def memory_scan_packed(
    write_slots: Tensor,
    write_weights: Tensor,
    read_slots: Tensor,
    read_weights: Tensor,
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    cu_seqlens: Tensor,
    decay_power: float = 1.0,
    eps: float = 1e-6,
    proxy_eps: float = 0.01,
    kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``ramnet.ops.memory_scan`` of packed documents, without its argument checks."""
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    output, new_memory, new_mass = (x.new_empty(x.shape) for x in (values, memory, mass))
    for group in _groups(cu_seqlens, values.shape[2], values.device):
        out, after, mass_after = library.memory_scan(
            *group.inputs(accesses, values, memory, mass), decay_power, eps, proxy_eps, kernels
        )
        group.scatter(out, output)
        new_memory[group.rows], new_mass[group.rows] = after, mass_after
    return output, new_memory, new_mass


@memory_scan_packed.register_fake
def _(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor, cu_seqlens: Tensor,
    decay_power: float = 1.0, eps: float = 1e-6, proxy_eps: float = 0.01, kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return values.new_empty(values.shape), memory.new_empty(memory.shape), mass.new_empty(mass.shape)


@torch.library.custom_op("ramnet::memory_scan_packed_backward", mutates_args=())
def memory_scan_packed_backward(
    grad_output: Tensor,
    grad_memory: Tensor,
    grad_mass: Tensor,
    write_slots: Tensor,
    write_weights: Tensor,
    read_slots: Tensor,
    read_weights: Tensor,
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    cu_seqlens: Tensor,
    decay_power: float,
    eps: float,
    proxy_eps: float,
    kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of write_weights, read_weights, values, memory and mass."""
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    grads = [x.new_empty(x.shape) for x in (write_weights, read_weights, values, memory, mass)]
    for group in _groups(cu_seqlens, values.shape[2], values.device):
        parts = library.memory_scan_backward(
            group.gather_zeros(grad_output), grad_memory[group.rows], grad_mass[group.rows],
            *group.inputs(accesses, values, memory, mass), decay_power, eps, proxy_eps, kernels,
        )  # fmt: skip
        for grad, part in zip(grads[:3], parts[:3], strict=True):
            group.scatter(part, grad)
        for grad, part in zip(grads[3:], parts[3:], strict=True):
            grad[group.rows] = part
    w, r, v, s, z = grads
    return w, r, v, s, z


@memory_scan_packed_backward.register_fake
def _(
    grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor,
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor, cu_seqlens: Tensor,
    decay_power: float, eps: float, proxy_eps: float, kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    w, r, v, s, z = (x.new_empty(x.shape) for x in (write_weights, read_weights, values, memory, mass))
    return w, r, v, s, z


def _differentiate(ctx: Any, grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
    grad_w, grad_r, grad_v, grad_s, grad_z = memory_scan_packed_backward(
        grad_output, grad_memory, grad_mass, *ctx.saved_tensors,
        ctx.decay_power, ctx.eps, ctx.proxy_eps, ctx.kernels,
    )  # fmt: skip
    return None, grad_w, None, grad_r, grad_v, grad_s, grad_z, None, None, None, None, None


memory_scan_packed.register_autograd(_differentiate, setup_context=library.save_scan_inputs)
