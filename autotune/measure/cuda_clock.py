"""Timing on a GPU, which runs asynchronously."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lowering.model.token_graphs import record_cuda

# The L2 cache is overwritten this many times, since it need not evict in LRU order.
OVER = 2
# The most seconds that the host runs ahead of the device, as about a thousand launches can be queued.
LONGEST_LEAD = 10e-3


class CudaClock:
    """Times each call by two events, after writes that evict its data from the L2 cache.

    The writes keep the device busy while the host queues the call, so that only the device's work is timed. A call that
    takes longer than ``LONGEST_LEAD`` to queue is limited by the host. The host synchronises once per sample.

    Args:
        flush: queues a write.
        cuda: the functions of ``torch.cuda``.
        host: the host's clock.
    """

    def __init__(
        self,
        flush: Callable[[], object] | None = None,
        cuda: Any = torch.cuda,
        host: Callable[[], float] = perf_counter,
    ) -> None:
        self.flush, self.cuda, self.host = flush or flusher(), cuda, host
        # Seconds, the least of each call. Weak, or what a call holds would be held until the clock goes.
        self.queueing: WeakKeyDictionary[Callable[[], object], float] = WeakKeyDictionary()
        self.write = LONGEST_LEAD
        self.write = min(self.seconds(self.flush, 3), self.seconds(self.flush, 3)) / 3

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Return the seconds of ``repeats`` calls, without the writes between them."""
        pairs = []
        for _ in range(repeats):
            begin, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            lead = min(self.queueing.get(call, 0.0), LONGEST_LEAD)
            for _ in range(1 + int(lead / self.write)):
                self.flush()
            begin.record()
            started = self.host()
            call()
            queued = self.host() - started
            end.record()
            self.queueing[call] = min(queued, self.queueing.get(call, queued))
            pairs.append((begin, end))
        self.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1e3


def flusher() -> Callable[[], object]:
    """Return a function that writes more than the device's L2 cache holds."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    scratch = torch.empty(OVER * max(size, 1 << 20), dtype=torch.uint8, device="cuda")
    return scratch.zero_


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Capture ``call`` as a CUDA graph and return its replay function, which needs no host work between launches.

    A graph has the addresses of the tensors that ``call`` uses, so the function keeps ``call``, and them, alive. Raises
    RuntimeError if ``call`` synchronises with the device.
    """
    replay, result = record_cuda(call, call)

    def again(_used: object = (call, result)) -> None:
        replay()

    return again
