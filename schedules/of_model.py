"""The workloads of a model's memory ops in training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ramnet.config import RamLayerConfig, RamNetConfig
from schedules.workload import Workload

Dtype = Literal["float32", "bfloat16"]


def of_model(config: RamNetConfig, batch_size: int = 1, length: int = 1024) -> list[Workload]:
    """Return the workloads of each kind of layer on a CPU: ``batch_size`` sequences of ``length`` tokens, and one token
    of each.

    Raises ValueError for a batch or a length below 1.
    """
    refuse_below_one(batch_size=batch_size, length=length)
    return _distinct(of_layer(layer, batch_size, length) for layer in config.kinds)


def of_layer(config: RamLayerConfig, batch_size: int = 1, length: int = 1024) -> list[Workload]:
    """Return the workloads of one layer on a CPU."""
    few, many, backward = _addresses(config, batch_size, 1), *_addresses_and_gradient(config, batch_size, length)
    return [few, many, backward, _step(config, batch_size), *_scans(config, batch_size, length)]


def of_training(config: RamLayerConfig, batch_size: int, length: int, dtype: Dtype) -> list[Workload]:
    """Return the workloads of one layer in training, forward and backward."""
    return [
        *_addresses_and_gradient(config, batch_size, length, dtype),
        *_scans(config, batch_size, length, dtype),
    ]


def of_model_on_gpu(
    config: RamNetConfig, batch_size: int = 16, length: int = 4096, decode_batch: int = 64
) -> list[Workload]:
    """Return the workloads of each kind of layer on a GPU in bfloat16.

    They are training on ``batch_size`` sequences of ``length`` tokens, and decoding one token of ``decode_batch``
    sequences. Raises ValueError for a batch or a length below 1.
    """
    refuse_below_one(batch_size=batch_size, length=length, decode_batch=decode_batch)
    return _distinct(_of_layer_on_gpu(layer, batch_size, length, decode_batch) for layer in config.kinds)


def _distinct(workloads: Iterable[list[Workload]]) -> list[Workload]:
    """Return the workloads of all layers, each once."""
    return list({workload.name: workload for of_layer in workloads for workload in of_layer}.values())


def _of_layer_on_gpu(config: RamLayerConfig, batch_size: int, length: int, decode_batch: int) -> list[Workload]:
    heads = Workload(
        op="decode_heads",
        shape={"N": decode_batch * config.num_heads, "U": config.order, "P": config.sub_dim, **_state(config)},
        dtype="bfloat16",
        constants=_constants(config),
    )
    return [
        *_addresses_and_gradient(config, batch_size, length, "bfloat16"),
        _step(config, decode_batch, "bfloat16"),
        heads,
        *_scans(config, batch_size, length, "bfloat16"),
    ]


def refuse_below_one(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _state(config: RamLayerConfig) -> dict[str, int]:
    return {"K": config.top_k, "M": config.slots, "D": config.value_dim}


def _constants(config: RamLayerConfig) -> dict[str, float]:
    return {"decay_power": config.decay_power, "eps": config.eps}


def _addresses(config: RamLayerConfig, batch_size: int, length: int, dtype: Dtype = "float32") -> Workload:
    """Return the workload of decoding a write address and a read address for each head and token."""
    rows = 2 * batch_size * config.num_heads * length
    shape = {"R": rows, "U": config.order, "P": config.sub_dim, "K": config.top_k}
    return Workload(op="address_decode", shape=shape, dtype=dtype)


def _addresses_and_gradient(
    config: RamLayerConfig, batch_size: int, length: int, dtype: Dtype = "float32"
) -> list[Workload]:
    forward = _addresses(config, batch_size, length, dtype)
    return [forward, forward.model_copy(update={"op": "address_decode_backward"})]


def _step(config: RamLayerConfig, batch_size: int, dtype: Dtype = "float32") -> Workload:
    shape = {"N": batch_size * config.num_heads, **_state(config)}
    return Workload(op="memory_step", shape=shape, dtype=dtype, constants=_constants(config))


def _scans(config: RamLayerConfig, batch_size: int, length: int, dtype: Dtype = "float32") -> list[Workload]:
    """Return the backward scan, then the forward scan."""
    shape = {"N": batch_size * config.num_heads, "T": length, **_state(config)}
    constants = _constants(config)
    return [
        Workload(op="memory_scan_backward", shape=shape, dtype=dtype,
                 constants={**constants, "proxy_eps": config.proxy_eps}),
        Workload(op="memory_scan", shape=shape, dtype=dtype, constants=constants),
    ]  # fmt: skip
