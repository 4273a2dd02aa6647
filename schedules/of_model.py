"""The workloads of a real model: what its memory ops meet in training, prefill and decoding."""

from __future__ import annotations

from ramnet.config import RamNetConfig
from schedules.workload import Workload


def of_model(config: RamNetConfig, batch_size: int = 1, length: int = 1024) -> list[Workload]:
    """The ops of one layer for ``batch_size`` sequences of ``length`` tokens, and for one token of each.

    ValueError for a batch or a length below 1.
    """
    for name, value in (("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    heads = batch_size * config.num_heads  # N
    address = {"U": config.order, "P": config.sub_dim, "K": config.top_k}
    state = {"K": config.top_k, "M": config.slots, "D": config.value_dim}
    constants = {"decay_power": config.decay_power, "eps": config.eps}
    proxy = {**constants, "proxy_eps": config.proxy_eps}
    rows = 2 * heads  # a write address and a read address for each head
    return [
        Workload(op="address_decode", shape={"R": rows, **address}),
        Workload(op="address_decode", shape={"R": rows * length, **address}),
        Workload(op="address_decode_backward", shape={"R": rows * length, **address}),
        Workload(op="memory_step", shape={"N": heads, **state}, constants=constants),
        Workload(op="memory_scan_backward", shape={"N": heads, "T": length, **state}, constants=proxy),
        Workload(op="memory_scan", shape={"N": heads, "T": length, **state}, constants=constants),
    ]
