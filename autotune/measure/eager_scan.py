"""The memory ops in eager PyTorch, from the simplest form to the fastest that was found.

Each has the arguments and results of the op in ``ramnet.ops``. N is B·H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Tokens per chunk: enough to amortise an op's overhead, few enough for the L2 cache.
CHUNK = 32


def scan_by_slots(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor, decay_power: float = 1.0, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The paper's formulas, line by line: a loop over tokens and slots."""
    memory, mass, output = memory.clone(), mass.clone(), torch.zeros_like(values)
    b, h = torch.meshgrid(*(torch.arange(n, device=memory.device) for n in memory.shape[:2]), indexing="ij")
    for t in range(values.shape[2]):
        for k in range(write_slots.shape[3]):
            slot, w = write_slots[:, :, t, k].long(), write_weights[:, :, t, k]
            decay = (1 - w) ** decay_power
            memory[b, h, slot] = decay.unsqueeze(-1) * memory[b, h, slot] + w.unsqueeze(-1) * values[:, :, t]
            mass[b, h, slot] = decay * mass[b, h, slot] + w
        for k in range(read_slots.shape[3]):
            slot, r = read_slots[:, :, t, k].long(), read_weights[:, :, t, k]
            output[:, :, t] += (r / (mass[b, h, slot] + eps)).unsqueeze(-1) * memory[b, h, slot]
    return output, memory, mass


def scan_in_place(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor, decay_power: float = 1.0, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A loop over tokens on a flat state, with index_select and index_copy_ on state and mass."""
    write_at, read_at = flat_slots(write_slots, memory), flat_slots(read_slots, memory)  # [T, N·K]
    w, r, v = (time_first(x) for x in (write_weights, read_weights, values))  # [T, N, K], [T, N, D]
    state = memory.clone().view(-1, memory.shape[-1])  # [N·M, D]
    z = mass.clone().view(-1)
    decay = (1 - w) ** decay_power
    output = torch.empty_like(v)
    for t in range(v.shape[0]):
        rows = state.index_select(0, write_at[t]).view(*w.shape[1:], -1)  # [N, K, D]
        rows = torch.addcmul(w[t].unsqueeze(-1) * v[t].unsqueeze(1), decay[t].unsqueeze(-1), rows)
        state.index_copy_(0, write_at[t], rows.flatten(0, 1))
        masses = z.index_select(0, write_at[t]).view(w.shape[1:])
        z.index_copy_(0, write_at[t], torch.addcmul(w[t], decay[t], masses).flatten())
        scaled = r[t] / (z.index_select(0, read_at[t]).view(r.shape[1:]) + eps)
        rows = state.index_select(0, read_at[t]).view(*r.shape[1:], -1)
        torch.bmm(scaled.unsqueeze(1), rows, out=output[t].unsqueeze(1))
    return time_last(output, values.shape), state.view(memory.shape), z.view(mass.shape)


def scan_chunked(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor, decay_power: float = 1.0, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The fastest form found: four calls per token, and all that needs no order for a chunk of tokens at a time.

    The mass is a column of the state whose value is 1, so that one gather and one scatter serve both.
    """
    trace = Trace(write_slots, write_weights, read_slots, read_weights, values, memory, mass, decay_power)
    output = trace.v.new_empty(trace.v.shape[0], trace.v.shape[1], trace.v.shape[2] - 1)
    old, new, seen = (trace.empty_rows(CHUNK) for _ in range(3))
    for begin in range(0, output.shape[0], CHUNK):
        chunk = trace.write_and_read(begin, old, new, seen)
        output[chunk] = trace.read_out(chunk, seen, eps)
    return (time_last(output, values.shape), *trace.final())


class Trace:
    """The accesses in time order on a flat state [N·M, D + 1], whose last column is the mass."""

    def __init__(
        self, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
        values: Tensor, memory: Tensor, mass: Tensor, decay_power: float,
    ) -> None:  # fmt: skip
        self.write_at = list(flat_slots(write_slots, memory).unbind())
        self.read_at = list(flat_slots(read_slots, memory).unbind())
        self.w, self.r = time_first(write_weights), time_first(read_weights)  # [T, N, K]
        self.v = torch.nn.functional.pad(time_first(values), (0, 1), value=1.0)  # [T, N, D + 1]
        self.state = torch.cat([memory, mass.unsqueeze(-1)], -1).flatten(0, 2)
        self.decay = ((1 - self.w) ** decay_power).flatten(1).unsqueeze(-1)  # [T, N·K, 1]
        self.shape = mass.shape

    def empty_rows(self, tokens: int) -> Tensor:
        """Return uninitialised rows [tokens, N·K, D + 1]."""
        return self.state.new_empty(tokens, self.decay.shape[1], self.state.shape[1])

    def write_and_read(self, begin: int, old: Tensor, new: Tensor, seen: Tensor) -> slice:
        """Run a chunk of tokens from ``begin``, storing the rows before each write, after it, and at each read."""
        chunk = slice(begin, min(begin + CHUNK, len(self.write_at)))
        written = torch.mul(self.w[chunk].unsqueeze(-1), self.v[chunk].unsqueeze(2)).flatten(1, 2)
        state = self.state
        rows = zip(
            self.write_at[chunk], self.read_at[chunk], written, self.decay[chunk],
            old.unbind(), new.unbind(), seen.unbind(), strict=False,
        )  # fmt: skip
        for write_at, read_at, addend, decay, before, after, read in rows:
            torch.index_select(state, 0, write_at, out=before)
            state.index_copy_(0, write_at, torch.addcmul(addend, before, decay, out=after))
            torch.index_select(state, 0, read_at, out=read)
        return chunk

    def read_out(self, chunk: slice, seen: Tensor, eps: float) -> Tensor:
        """Return the outputs [C, N, D] of a chunk."""
        seen = seen[: chunk.stop - chunk.start].view(*self.r[chunk].shape, -1)  # [C, N, K, D + 1]
        scaled = self.r[chunk] / (seen[..., -1] + eps)
        return torch.matmul(scaled.unsqueeze(2), seen[..., :-1]).squeeze(2)

    def final(self) -> tuple[Tensor, Tensor]:
        """Return memory [B, H, M, D] and mass [B, H, M]."""
        return self.state[:, :-1].reshape(*self.shape, -1), self.state[:, -1].reshape(self.shape)


def as_state(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Convert the weights and values of a scan to the state's dtype, as these forms need."""
    dtype = tensors[5].dtype
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]


def flat_slots(slots: Tensor, memory: Tensor) -> Tensor:
    """Convert slots [B, H, T, K] to row numbers of the flat state, int64 [T, N·K]."""
    heads = memory.shape[0] * memory.shape[1]
    base = torch.arange(heads, device=slots.device).view(-1, 1, 1) * memory.shape[2]
    return (slots.long().flatten(0, 1) + base).transpose(0, 1).flatten(1)


def time_first(tensor: Tensor) -> Tensor:
    """Convert [B, H, T, X] to [T, N, X]."""
    return tensor.flatten(0, 1).transpose(0, 1).contiguous()


def time_last(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Convert [T, N, X] to ``shape``, [B, H, T, X]."""
    return tensor.transpose(0, 1).reshape(shape)
