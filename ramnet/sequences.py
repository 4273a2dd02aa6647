"""The sequences among the tokens of a batch, where they are not simply its rows."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ramnet.state import can_be_read

_MASK_TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Sequences(NamedTuple):
    """R sequences of at most L tokens each, among the tokens [B, T] of a batch.

    A layer computes what concerns tokens alone on [B, T], and what goes along a sequence on [R, L], where each
    begins at 0. Past its end a sequence writes and reads with weight 0, which changes neither memory nor mass.

    Attributes:
        source: int64 [R, L], the place of each token among the B·T; past the end, that of some token.
        inside: bool [R, L], False past the end.
        lengths: int64 [R].
        back: int64 [B, T], the place of each token among the R·L; that of some token for padding.
        real: bool [B, T], False for padding; None where there is none.
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
        """What ``padded`` or ``packed`` makes of the one that is given; None where the rows are the sequences.

        ValueError where both are given; further errors are theirs.
        """
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("attention_mask and cu_seqlens are both given; packed documents have no padding")
        if attention_mask is not None:
            return cls.padded(attention_mask, shape, device)
        return None if cu_seqlens is None else cls.packed(cu_seqlens, shape, device)

    @classmethod
    def padded(cls, attention_mask: Tensor, shape: tuple[int, int], device: torch.device) -> Self:
        """The rows of a batch without their padding, R = B and L = T, wherever in a row the padding is.

        Args:
            attention_mask: bool or integer [B, T], True or 1 for a token.
            shape: B and T. device: of the tokens.

        Raises:
            ValueError: for another shape or device, and numbers other than 0 and 1 on the CPU.
            TypeError: for floating masks, such as attention adds to its scores.
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
        # A stable sort keeps the tokens of a row in their order, and puts the padding behind them.
        source = starts + (~real).to(torch.uint8).argsort(dim=1, stable=True)
        lengths = real.sum(1)
        inside = torch.arange(tokens, device=device) < lengths.unsqueeze(1)
        back = starts + (real.cumsum(1) - 1).clamp(min=0)
        return cls(source, inside, lengths, back, real)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, shape: tuple[int, int], device: torch.device) -> Self:
        """The documents that one row holds one after another, R = D; L is the length of the longest.

        Args:
            cu_seqlens: int32 or int64 [D + 1], on any device: where each document begins, and T. Its numbers are read,
                which waits for a GPU and has no place within a graph of torch.compile.
            shape: 1 and T. device: of the tokens.

        Raises:
            ValueError: for a batch other than 1, another shape, and numbers that do not rise from 0 to T.
            TypeError: for other types.
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
                raise ValueError(f"cu_seqlens falls from {before} to {after}; it must not fall")
        longest = max(after - before for before, after in pairwise(bounds))
        at = torch.tensor(bounds, device=device)
        lengths, steps = at.diff(), torch.arange(longest, device=device)
        source = (at[:-1].unsqueeze(1) + steps).clamp(max=tokens - 1)
        document = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=tokens)
        back = document * longest + torch.arange(tokens, device=device) - at[document]
        return cls(source, steps < lengths.unsqueeze(1), lengths, back.unsqueeze(0), None)

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, …] as [R, L, …], with zeros past the ends."""
        return _keep(self.inside, self.take(x))

    def take(self, x: Tensor) -> Tensor:
        """``gather`` with some token's values past the ends."""
        return _pick(x, self.source)

    def scatter(self, x: Tensor) -> Tensor:
        """[R, L, …] as [B, T, …], with zeros for padding."""
        return self.without_padding(_pick(x, self.back))

    def without_padding(self, x: Tensor) -> Tensor:
        """x [B, T, …] with zeros for padding, whose numbers may be NaN."""
        return x if self.real is None else _keep(self.real, x)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])


def _keep(where: Tensor, x: Tensor) -> Tensor:
    return x.masked_fill(~where.view(*where.shape, *[1] * (x.dim() - 2)), 0)
