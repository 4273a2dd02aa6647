"""Workloads parsed from a user's text."""

from __future__ import annotations

import pytest

from ramnet.config import RamNetConfig
from schedules.of_model import of_model
from schedules.shapes import parse
from schedules.workload import AXES

CONFIG = RamNetConfig.preset("340m")


def test_given_sizes_override_the_models() -> None:
    workload = parse("memory_scan N=4 T=512 D=32 decay_power=2 dtype=bfloat16", CONFIG, on_gpu=True)
    assert workload.shape == {"N": 4, "T": 512, "K": 8, "M": 1024, "D": 32}
    assert tuple(workload.shape) == AXES["memory_scan"]
    assert (workload.dtype, workload.constants) == ("bfloat16", {"decay_power": 2.0, "eps": CONFIG.eps})
    for on_gpu, default in ((True, "bfloat16"), (False, "float32")):
        assert parse("memory_step", CONFIG, on_gpu).dtype == default
        assert parse("memory_step dtype=float64", CONFIG, on_gpu).dtype == "float64"


BY_LAYER = CONFIG.model_copy(update={"num_layers": 2, "cape_full_layers": 0, "cape_half_layers": 0, "sub_dim": [4, 2]})


def test_sizes_that_differ_between_layers_must_be_given() -> None:
    with pytest.raises(ValueError, match="lacks M"):
        parse("memory_step", BY_LAYER)
    assert parse("memory_step M=32", BY_LAYER).shape == {"N": 16, "K": 8, "M": 32, "D": 64}


def test_a_workload_that_layers_share_is_one() -> None:
    shapes = [(workload.op, workload.shape["M"]) for workload in of_model(BY_LAYER) if "M" in workload.shape]
    assert sorted(shapes) == [
        (op, m) for op in ("memory_scan", "memory_scan_backward", "memory_step") for m in (32, 1024)
    ]
    shared = BY_LAYER.model_copy(update={"sub_dim": 4, "value_dim": [64, 32]})
    assert sum(workload.op == "address_decode_backward" for workload in of_model(shared)) == 1


@pytest.mark.parametrize("config", [CONFIG, BY_LAYER], ids=["340m", "by layer"])
def test_each_of_a_models_workloads_can_be_written(config: RamNetConfig) -> None:
    for workload in of_model(config, batch_size=2, length=64):
        sizes = " ".join(f"{axis}={size}" for axis, size in workload.shape.items())
        assert parse(f"{workload.op} {sizes}", config) == workload


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has the op ''; there are address_decode"),
        ("memory_scam T=1", "has the op 'memory_scam'; there are address_decode"),
        ("memory_scan", "'memory_scan' lacks T"),
        ("address_decode", "lacks R"),
        ("memory_scan T=many", "has 'T=many', which is no number"),
        ("memory_scan T=0", "has T=0; it must be at least 1"),
        ("memory_scan T=4294967296", "memory_scan has T = 4294967296; kernels count in int32"),
        ("memory_scan T=1 U=5", "has 'U=5'; memory_scan has N, T, K, M, D, decay_power, eps, dtype"),
        ("memory_scan T=1 dtype=int8", "dtype"),
        ("memory_step decay_power=inf", "decay_power is inf; it must be finite"),
        ("memory_step decay_power=-1", "decay_power is -1.0; it must be finite"),
        ("memory_step eps=0", "eps is 0.0; it must be > 0"),
        ("memory_step eps=1e39", "eps is 1e\\+39; it must be > 0 and finite, also in float32"),
        ("memory_scan_backward T=1 proxy_eps=0", r"proxy_eps is 0.0; it must be in \(0, 1\]"),
        ("memory_step dtype=bfloat16", "is of bfloat16; a CPU's kernels compute in float32 or float64"),
        ("address_decode R=1 U=20000", r"has P\^U = 4\^20000 slots; kernels count to 2\^31 - 1"),
        ("decode_heads U=2 P=3 M=10", r"has M = 10; there are P\^U = 9 slots"),
        ("memory_step K=100 M=64", "has K = 100; there are only M = 64 slots"),
        ("address_decode R=1 U=2 P=3 K=10", r"has K = 10; there are only P\^U = 9 slots"),
    ],
)
def test_invalid_text_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text, CONFIG)


def test_a_step_of_heads_has_as_many_slots_as_its_addresses() -> None:
    assert parse("decode_heads U=2 P=3", CONFIG, on_gpu=True).shape["M"] == 9
