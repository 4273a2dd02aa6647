"""Padded and packed batches: the sequences that the tokens of a batch belong to."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ramnet.ops.packed import check_bounds
from ramnet.state_checks import can_be_read

_MASK_TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Sequences(NamedTuple):
    """The R sequences that the tokens [B, T] of a batch belong to.

    Attributes:
        row: int64 [B, T], the sequence of each token.
        offset: int64 [B, T], the index of each token in its sequence; any index for padding.
        lengths: int64 [R].
        first: int64 [R], the index in ``source`` at which each sequence begins.
        source: int64 [B·T], the indices of the tokens in the flattened [B, T], ordered by sequence.
        real: bool [B, T], False for padding; None if there is none.
        cu_seqlens: int64 [R + 1] on the CPU, for packed documents; None otherwise.
    """

    row: Tensor
    offset: Tensor
    lengths: Tensor
    first: Tensor
    source: Tensor
    real: Tensor | None
    cu_seqlens: Tensor | None

    @classmethod
    def of(
        cls, attention_mask: Tensor | None, cu_seqlens: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Self | None:
        """Return ``padded`` or ``packed`` of the argument that is given, or None if neither is.

        Raises ValueError if both are given, TypeError if one is not a tensor, and the errors of ``padded`` and
        ``packed``.
        """
        for name, given in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
            if not isinstance(given, Tensor | None):
                raise TypeError(f"{name} is a {type(given).__name__}; it must be a tensor")
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("attention_mask and cu_seqlens are both given; packed documents have no padding")
        if attention_mask is not None:
            return cls.padded(attention_mask, shape, device)
        if cu_seqlens is None:
            return None
        documents = cls.packed(cu_seqlens, shape, device)
        return None if len(documents.lengths) == 1 else documents  # a single one is a row like any other

    @classmethod
    def padded(cls, attention_mask: Tensor, shape: tuple[int, int], device: torch.device) -> Self:
        """Return the rows of a padded batch as sequences, R = B. Padding may be anywhere in a row.

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
            raise ValueError(f"attention_mask holds {int(attention_mask[wrong][0])}; it must hold only 0 and 1")
        batch, tokens = shape
        real = attention_mask.bool()
        rows = torch.arange(batch, device=device)
        first = tokens * rows
        # A stable sort moves the padding of a row behind its tokens and keeps their order.
        source = first.unsqueeze(1) + (~real).to(torch.uint8).argsort(dim=1, stable=True)
        index = (real.cumsum(1) - 1).clamp(min=0)
        return cls(rows.unsqueeze(1).expand(shape), index, real.sum(1), first, source.flatten(), real, None)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, shape: tuple[int, int], device: torch.device) -> Self:
        """Return the documents packed into one row as sequences; R is their number.

        Args:
            cu_seqlens: int32 or int64 [R + 1] on any device, the offset at which each document begins, then T. It is
                copied to the CPU, which synchronises with a GPU.
            shape: (1, T).
            device: the device of the tokens.

        Raises:
            ValueError: if B is not 1, ``cu_seqlens`` is not [R + 1], or its values do not ascend from 0 to T. In a
                graph of torch.compile, which cannot read the values, ``memory_scan`` checks them.
            TypeError: if ``cu_seqlens`` is neither int32 nor int64.
        """
        batch, tokens = shape
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}; it must be torch.int32 or torch.int64")
        if batch != 1:
            raise ValueError(f"cu_seqlens is given for a batch of {batch}; packed documents are one row, [1, T]")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [S + 1] with S >= 1")
        bounds = cu_seqlens.to("cpu", torch.int64)
        if can_be_read(bounds):
            check_bounds(bounds, tokens)
        at, place = bounds.to(device), torch.arange(tokens, device=device)
        row = torch.searchsorted(at[1:], place, right=True).clamp(max=len(bounds) - 2)
        index = place - at[row]
        return cls(row.unsqueeze(0), index.unsqueeze(0), at.diff(), at[:-1], place, None, bounds)

    def positions(self, begun: Tensor) -> Tensor:
        """Return the position of each token, int64 [B, T], in sequences that had ``begun`` [R] tokens before."""
        return begun[self.row] + self.offset

    def places(self, row: Tensor, index: Tensor, kept: int) -> Tensor:
        """Return the place of token ``index`` of sequence ``row`` in the concatenation of two flattened tensors.

        The first, [R, kept], holds the last ``kept`` tokens before each sequence, the second the tokens [B, T]. An
        index of −1 is the last token before the sequence. ``row`` and ``index`` have one shape, that of the result.
        """
        before = kept * len(self.lengths)
        line = torch.cat([torch.arange(before, device=row.device), before + self.source])
        return line[torch.where(index < 0, kept * (row + 1), before + self.first[row]) + index]

    def without_padding(self, x: Tensor) -> Tensor:
        """Return x [B, T, …] with padding, which may hold NaN, set to zero."""
        return x if self.real is None else x.masked_fill(~self.real.view(*self.real.shape, *[1] * (x.dim() - 2)), 0)
