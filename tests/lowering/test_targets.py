"""The target of a device, determined from its properties in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowering import targets

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, gcnArchName="NVIDIA H100 80GB HBM3", multi_processor_count=132,
    L2_cache_size=52428800, shared_memory_per_multiprocessor=233472, max_threads_per_multi_processor=2048,
)  # fmt: skip
MI300X = SimpleNamespace(
    **{**vars(H100), "name": "AMD Instinct MI300X", "gcnArchName": "gfx942:sramecc+:xnack-", "minor": 4,
       "multi_processor_count": 7, "L2_cache_size": 8, "shared_memory_per_multiprocessor": 9,
       "max_threads_per_multi_processor": 10},
)  # fmt: skip


@pytest.mark.parametrize(("told", "name", "arch"), [(H100, "h100", "sm_90"), (MI300X, "mi300x", "gfx942")])
def test_the_architecture_is_read_as_each_vendor_reports_it(
    monkeypatch: pytest.MonkeyPatch, told: SimpleNamespace, name: str, arch: str
) -> None:
    """On CUDA ``gcnArchName`` is the device's name."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    found = targets._recognised.__wrapped__(0)
    assert found.gpu is not None
    assert (found.name, found.gpu.arch) == (name, arch)
    expected = (7, 8, 9, 10) if told is MI300X else (132, 52428800, 233472, 2048)
    assert (found.gpu.processors, found.gpu.l2, found.gpu.shared, found.gpu.threads) == expected
    assert found.gpu.backend == ("hip" if told is MI300X else "cuda")
    assert found.gpu.shared_block == targets.gpu_of(name).shared_block, "not every version of torch tells it"
    told = SimpleNamespace(**vars(told), shared_memory_per_block_optin=11)
    assert targets._recognised.__wrapped__(0).gpu.shared_block == 11


def test_a_device_that_is_here_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = targets.recognise("NVIDIA H200 NVL", "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 NVL")
    for here, names in ((h200, ("NVIDIA H200 NVL", "a100")), (None, ("h200", "a100"))):
        monkeypatch.setattr(targets, "here", lambda here=here: here)
        assert (targets.device_of("h200"), targets.device_of("a100")) == names
    assert targets.device_of("cpu") == targets.cpu_name()


def test_the_target_here_is_that_of_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert targets.here() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: (MI300X, H100)[device])
    monkeypatch.setattr(targets, "_recognised", targets._recognised.__wrapped__)
    found = targets.here()
    assert found is not None and found.name == "h100"


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
    ("device", "arch", "name"),
    [
        ("NVIDIA A100 80GB PCIe", "sm_80", "a100"),
        ("NVIDIA RTX 5090", "sm_120", "b200"),
        ("AMD Instinct MI250X", "gfx90a", "mi300x"),  # "90" in the name does not make it an H100
    ],
)
def test_an_unknown_device_is_the_nearest_with_a_notice(device: str, arch: str, name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{device} \({arch}\) is not in the table of targets; using .* of {name} "):
        found = targets.recognise(device, arch)
    assert found.name == name and found.gpu is not None and found.gpu.arch == arch


X86 = """processor\t: 0
model name\t: Some CPU @ 2 GHz
cpu MHz\t\t: 2000
flags\t\t: fpu avx avx2 sse

processor\t: 1
model name\t: Another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd0b\n"


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], tuple[str, str]]:
    """The name and digest of a processor with this /proc/cpuinfo."""
    monkeypatch.setattr(targets.platform, "processor", lambda: "")
    monkeypatch.setattr(targets.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(targets, "Path", lambda path: tmp_path / path.lstrip("/"))
    (tmp_path / "proc").mkdir()

    def told(text: str | None) -> tuple[str, str]:
        (tmp_path / "proc" / "cpuinfo").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "proc" / "cpuinfo").write_bytes(text.encode() + b"\n\nmodel name\t: \xff\n")
        return targets.cpu_name.__wrapped__(), targets.cpu_digest.__wrapped__()

    return told


def test_a_processor_is_named_by_itself_with_its_widest_vectors(
    processor: Callable[[str | None], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert processor(X86)[0] == "Some CPU @ 2 GHz avx2"
    assert processor(X86.replace("sse", "avx512f"))[0] == "Some CPU @ 2 GHz avx512f"
    assert processor(ARM)[0] == "aarch64 0xd0b asimd"
    assert processor(f"CPU implementer\t: 0x41\n{ARM}")[0] == "aarch64 0x41 0xd0b asimd"
    assert processor(None)[0] == "aarch64"
    monkeypatch.setattr(targets.platform, "processor", lambda: "arm")
    assert processor(None)[0] == "arm"


def test_machine_code_is_shared_within_one_processor_with_its_features(
    processor: Callable[[str | None], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = processor(X86)[1]
    assert processor(X86.replace("2000", "3000").replace("Another", "A third"))[1] == digest
    others = [processor(text)[1] for text in (X86.replace("sse", "bmi"), X86.replace("Some", "No"), ARM, None)]
    others.append(processor(ARM.replace("0xd0b", "0xd0c"))[1])
    monkeypatch.setattr(targets.platform, "machine", lambda: "x86_64")
    others.append(processor(X86)[1])
    assert len({digest, *others}) == 7
