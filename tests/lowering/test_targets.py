"""Which target a device is, from what torch tells of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowering import targets

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, gcnArchName="NVIDIA H100 80GB HBM3", multi_processor_count=132,
    L2_cache_size=52428800, shared_memory_per_multiprocessor=233472, max_threads_per_multi_processor=2048,
)  # fmt: skip
MI300X = SimpleNamespace(
    **{**vars(H100), "name": "AMD Instinct MI300X", "gcnArchName": "gfx942:sramecc+:xnack-", "minor": 4},
)


@pytest.mark.parametrize(("told", "name", "arch"), [(H100, "h100", "sm_90"), (MI300X, "mi300x", "gfx942")])
def test_a_device_has_the_architecture_that_torch_tells_each_vendor_in_its_way(
    monkeypatch: pytest.MonkeyPatch, told: SimpleNamespace, name: str, arch: str
) -> None:
    """On CUDA ``gcnArchName`` is the device's name."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    found = targets._recognised.__wrapped__(0)
    assert found.gpu is not None
    assert (found.name, found.gpu.arch) == (name, arch)
    assert (found.gpu.processors, found.gpu.l2) == (132, 52428800)


@pytest.mark.parametrize(
    ("device", "arch", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "sm_80", "a100-40gb"),
        ("NVIDIA H200", "sm_90", "h200"),
        ("NVIDIA L40S", "sm_89", "l40s"),
        ("NVIDIA L4", "sm_89", "l4"),
        ("NVIDIA A10G", "sm_86", "a10"),
    ],
)
def test_a_device_is_known_by_its_name(device: str, arch: str, name: str) -> None:
    assert targets.recognise(device, arch).name == name


@pytest.mark.parametrize(
    ("device", "arch", "name"), [("NVIDIA A100 80GB PCIe", "sm_80", "a100"), ("NVIDIA RTX 5090", "sm_120", "b200")]
)
def test_an_unknown_device_is_the_nearest_with_a_notice(device: str, arch: str, name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{device} \({arch}\) is not in the table of targets; using .* of {name} "):
        found = targets.recognise(device, arch)
    assert found.name == name and found.gpu is not None and found.gpu.arch == arch
