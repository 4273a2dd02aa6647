"""One head of a trace, as its pictures show it: for one sequence, without padding, and in shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ramnet.ops import Accesses
from ramnet.tracing.data import LayerTrace, Reads, Trace

SOURCES = 6  # the tokens that are kept as sources of each read


class HeadTrace(NamedTuple):
    """What one head did with one sequence of T tokens.

    Attributes:
        layer, head: counted from 1.
        moves: whether its addresses move with the position (CAPE).
        accesses: slots and weights, [T, K].
        written, read: the sums of the weights of each slot, [M].
        share_used: the share of the slots that were written.
        busiest: how few slots hold half of all that was written.
        sources: int64 [T, n], the tokens whose writes each token reads most, in descending order of share.
        shares: [T, n], the shares of these in all that the token reads; 0 for tokens that it does not read.
        before: [T], the share of what was there before the first token.
        ages: [T], by age in tokens, the shares in all that is read at any time; what was there before has no age.
    """

    layer: int
    head: int
    moves: bool
    accesses: Accesses[Tensor]
    written: Tensor
    read: Tensor
    share_used: float
    busiest: int
    sources: Tensor
    shares: Tensor
    before: Tensor
    ages: Tensor

    @property
    def name(self) -> str:
        return f"Layer {self.layer}, head {self.head}"

    def median_age(self) -> int | None:
        """Return the age that half of all that is read does not exceed; None if more than half was there before."""
        reached = self.ages.cumsum(0) >= 0.5
        return int(reached.to(torch.uint8).argmax()) if bool(reached.any()) else None

    def age(self) -> str:
        """Return ``median_age`` in words."""
        median = self.median_age()
        if median is None:
            return "over half was there before"
        return f"half is at most {median} tokens old" if median else "half is of the token itself"


def heads_of(
    trace: Trace, row: int = 0, layers: Sequence[int] = (), heads: Sequence[int] = (), most: int = SOURCES
) -> list[HeadTrace]:
    """Return the heads of sequence ``row``: those of these ``layers`` and ``heads``, counted from 1, or all if empty.

    Raises ValueError if there is no such layer or head, or the sequence holds padding alone.
    """
    if wrong := [number for number in layers if not 1 <= number <= len(trace.layers)]:
        raise ValueError(f"layer {wrong[0]} is not there; there are layers 1..{len(trace.layers)}")
    numbered = [(i, layer) for i, layer in enumerate(trace.layers, start=1) if not layers or i in layers]
    most_heads = max(layer.mass.shape[1] for _, layer in numbered)
    if wrong := [number for number in heads if not 1 <= number <= most_heads]:
        raise ValueError(f"head {wrong[0]} is not there; there are heads 1..{most_heads}")
    if not bool(trace.real[row].any()):
        raise ValueError(f"row {row} holds no token, only padding")
    found = []
    for i, layer in numbered:
        traced = _row(layer, row)
        reads, use = traced.reads(most), _Use(*traced.use(), traced.share_used(), traced.busiest_slots())
        chosen = [h for h in range(traced.mass.shape[1]) if not heads or h + 1 in heads]
        found += [_head(traced, reads, use, trace.real[row], i, h) for h in chosen]
    return found


def _row(layer: LayerTrace, row: int) -> LayerTrace:
    keep = slice(row, row + 1)
    accesses = Accesses(*(x[keep] for x in layer.accesses))
    return replace(layer, accesses=accesses, mass=layer.mass[keep], position=layer.position[keep])


class _Use(NamedTuple):
    """The use of the slots by all heads: ``LayerTrace.use``, ``share_used`` and ``busiest_slots``."""

    written: Tensor
    read: Tensor
    share: Tensor
    busiest: Tensor


def _head(layer: LayerTrace, reads: Reads, use: _Use, real: Tensor, number: int, head: int) -> HeadTrace:
    tokens, weights, total, before, by_age = (x[0, head][real] for x in reads)
    everything = (total + before).clamp(min=torch.finfo(total.dtype).tiny)
    written, read, share, busiest = (x[0, head] for x in use)
    by_age = reads.by_age[0, head, : int(real.sum())]
    return HeadTrace(
        number, head + 1, head < layer.cape_heads, Accesses(*(x[0, head][real] for x in layer.accesses)), written, read,
        float(share), int(busiest), layer.position[0][tokens],
        weights / everything.unsqueeze(-1), before / everything, by_age / everything.sum(),
    )  # fmt: skip
