"""Padded and packed batches: where the sequences are among the tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ramnet.state import can_be_read

_MASK_TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Sequences(NamedTuple):
    """The map between the tokens [B, T] of a batch and its R sequences of at most L tokens each, [R, L].

    Operations on single tokens run on [B, T]; operations along a sequence run on [R, L], where every sequence begins at
    index 0. Beyond a sequence's end, write and read weights are 0, which changes neither memory nor mass.

    Attributes:
        source: int64 [R, L], the index of each token in the flattened [B, T]; any valid index beyond the end.
        inside: bool [R, L], False beyond the end.
        lengths: int64 [R].
        back: int64 [B, T], the index of each token in the flattened [R, L]; any valid index for padding.
        real: bool [B, T], False for padding; None if there is none.
    """

    source: Tensor
    inside: Tensor
    lengths: Tensor
    back: Tensor
    real: Tensor | None

    @classmethod
    def of(
        cls, attention_mask: Tensor | None, cu_seqlens: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Self | None:
        """Return ``padded`` or ``packed`` of the argument that is given, or None if neither is.

        Raises ValueError if both are given, and the errors of ``padded`` and ``packed``.
        """
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("attention_mask and cu_seqlens are both given; packed documents have no padding")
        if attention_mask is not None:
            return cls.padded(attention_mask, shape, device)
        return None if cu_seqlens is None else cls.packed(cu_seqlens, shape, device)

    @classmethod
    def padded(cls, attention_mask: Tensor, shape: tuple[int, int], device: torch.device) -> Self:
        """Return the rows of a padded batch as sequences, R = B and L = T. Padding may be anywhere in a row.

        Args:
            attention_mask: bool or integer [B, T], True or 1 for a token.
            shape: (B, T).
            device: the device of the tokens.

        Raises:
            ValueError: if the mask has another shape or device or, on the CPU, holds a value other than 0 and 1.
            TypeError: if the mask is floating, as additive masks of attention are.
        """
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; it must be {list(shape)}")
        if attention_mask.dtype not in _MASK_TYPES:
            raise TypeError(f"attention_mask is {attention_mask.dtype}; it must be bool, or int64 of 0 and 1")
        if attention_mask.device != device:
            raise ValueError(f"attention_mask is on {attention_mask.device} but the tokens are on {device}")
        if can_be_read(attention_mask) and bool((wrong := (attention_mask < 0) | (attention_mask > 1)).any()):
            raise ValueError(f"attention_mask holds {int(attention_mask[wrong][0])}; it must hold 0 and 1 alone")
        batch, tokens = shape
        real = attention_mask.bool()
        starts = tokens * torch.arange(batch, device=device).unsqueeze(1)
        # A stable sort moves the padding of a row behind its tokens and keeps their order.
        source = starts + (~real).to(torch.uint8).argsort(dim=1, stable=True)
        lengths = real.sum(1)
        inside = torch.arange(tokens, device=device) < lengths.unsqueeze(1)
        back = starts + (real.cumsum(1) - 1).clamp(min=0)
        return cls(source, inside, lengths, back, real)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, shape: tuple[int, int], device: torch.device) -> Self:
        """Return the documents packed into one row as sequences; R is their number and L the length of the longest.

        Args:
            cu_seqlens: int32 or int64 [R + 1] on any device, the offset at which each document begins, then T. Its
                values are read, which synchronises with a GPU and breaks a graph of torch.compile.
            shape: (1, T).
            device: the device of the tokens.

        Raises:
            ValueError: if B is not 1, ``cu_seqlens`` is not [R + 1], or its values do not ascend from 0 to T.
            TypeError: if ``cu_seqlens`` is neither int32 nor int64.
        """
        batch, tokens = shape
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}; it must be torch.int32 or torch.int64")
        if batch != 1:
            raise ValueError(f"cu_seqlens is given for a batch of {batch}; packed documents are one row, [1, T]")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [D + 1] with D >= 1")
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens:
            raise ValueError(f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to {tokens}")
        for before, after in pairwise(bounds):
            if after < before:
                raise ValueError(f"cu_seqlens falls from {before} to {after}; it must be ascending")
        longest = max(after - before for before, after in pairwise(bounds))
        at = torch.tensor(bounds, device=device)
        lengths, steps = at.diff(), torch.arange(longest, device=device)
        source = (at[:-1].unsqueeze(1) + steps).clamp(max=tokens - 1)
        document = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=tokens)
        back = document * longest + torch.arange(tokens, device=device) - at[document]
        return cls(source, steps < lengths.unsqueeze(1), lengths, back.unsqueeze(0), None)

    def gather(self, x: Tensor) -> Tensor:
        """Convert [B, T, …] to [R, L, …], with zeros beyond the ends."""
        return _keep(self.inside, self.take(x))

    def take(self, x: Tensor) -> Tensor:
        """Convert [B, T, …] to [R, L, …], with the values of any token beyond the ends."""
        return _pick(x, self.source)

    def scatter(self, x: Tensor) -> Tensor:
        """Convert [R, L, …] to [B, T, …], with zeros for padding."""
        return self.without_padding(_pick(x, self.back))

    def without_padding(self, x: Tensor) -> Tensor:
        """Return x [B, T, …] with padding, which may hold NaN, set to zero."""
        return x if self.real is None else _keep(self.real, x)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])


def _keep(where: Tensor, x: Tensor) -> Tensor:
    return x.masked_fill(~where.view(*where.shape, *[1] * (x.dim() - 2)), 0)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of sequences in groups, each of which takes at most twice its tokens where it is padded.

    Longest first, and in rising order within a group; an empty sequence counts as one token. There are at most
    log2 of the longest and one more.
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
