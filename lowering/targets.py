"""The machines that kernels can be compiled for."""

from __future__ import annotations

import hashlib
import platform
import re
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """What compilers and the time model need to know about a GPU.

    Attributes:
        arch: the architecture, such as "sm_90" or "gfx942".
        processors: streaming multiprocessors (compute units on AMD).
        shared, shared_block: bytes of shared memory per processor, and the most that one thread block may use.
        threads, programs: the most threads and thread blocks resident on a processor.
        l2: bytes of L2 cache.
        bandwidth: of memory, in bytes/s.
        clock: boost clock in Hz.
        warp: threads per warp (wavefront on AMD).
        registers: 32-bit registers per processor.
    """

    arch: str
    processors: int
    shared: int
    shared_block: int
    threads: int
    programs: int
    l2: int
    bandwidth: float
    clock: float
    warp: int = 32
    registers: int = 65536

    @property
    def backend(self) -> str:
        """Triton's name of the GPU's backend."""
        return "hip" if self.arch.startswith("gfx") else "cuda"


@dataclass(frozen=True)
class Target:
    """A machine that kernels can be compiled for; ``gpu`` is None for a CPU."""

    name: str
    description: str
    compilers: tuple[str, ...]  # "tir", "triton"
    gpu: Gpu | None = None
    matches: str = ""  # part of the driver's name of the device


# From NVIDIA's CUDA programming guide ("Technical specifications per compute capability"): KB of shared memory per
# processor and per thread block, threads and thread blocks per processor.
_CAPABILITY = {
    "sm_80": (164, 163, 2048, 32),
    "sm_86": (100, 99, 1536, 16),
    "sm_87": (164, 163, 1536, 16),
    "sm_89": (100, 99, 1536, 24),
    "sm_90": (228, 227, 2048, 32),
    "sm_100": (228, 227, 2048, 32),
}


def _nvidia(arch: str, processors: int, l2_mb: float, gb_s: float, ghz: float) -> Gpu:
    shared, shared_block, threads, programs = _CAPABILITY[arch]
    return Gpu(
        arch, processors, shared << 10, shared_block << 10, threads, programs, int(l2_mb * 2**20), gb_s * 1e9,
        ghz * 1e9,
    )  # fmt: skip


# Processors, L2 and bandwidth are from the vendors' data sheets. The B200's L2 and some of the boost clocks are not
# given there and are assumed.
_GPUS = (
    Target("a100", "NVIDIA A100 80 GB SXM", ("triton", "tir"),
           _nvidia("sm_80", 108, 40, 2039, 1.41), "A100-SXM4-80GB"),
    Target("a100-40gb", "NVIDIA A100 40 GB SXM", ("triton", "tir"),
           _nvidia("sm_80", 108, 40, 1555, 1.41), "A100-SXM4-40GB"),
    Target("h100", "NVIDIA H100 SXM", ("triton", "tir"),
           _nvidia("sm_90", 132, 50, 3350, 1.98), "H100"),
    Target("h200", "NVIDIA H200", ("triton", "tir"), _nvidia("sm_90", 132, 60, 4800, 1.98), "H200"),
    Target("b200", "NVIDIA B200", ("triton", "tir"), _nvidia("sm_100", 148, 126, 8000, 1.965), "B200"),
    Target("l4", "NVIDIA L4", ("triton", "tir"), _nvidia("sm_89", 58, 48, 300, 2.04), "L4"),
    Target("l40s", "NVIDIA L40S", ("triton", "tir"), _nvidia("sm_89", 142, 96, 864, 2.52), "L40S"),
    Target("a10", "NVIDIA A10", ("triton", "tir"), _nvidia("sm_86", 72, 6, 600, 1.695), "A10"),
    Target("rtx3090", "NVIDIA GeForce RTX 3090", ("triton", "tir"),
           _nvidia("sm_86", 82, 6, 936, 1.695), "RTX 3090"),
    Target("rtx4090", "NVIDIA GeForce RTX 4090", ("triton", "tir"),
           _nvidia("sm_89", 128, 72, 1008, 2.52), "RTX 4090"),
    Target("orin", "NVIDIA Jetson AGX Orin", ("triton", "tir"),
           _nvidia("sm_87", 16, 4, 205, 1.3), "Orin"),
    Target("mi300x", "AMD Instinct MI300X", ("triton",),
           Gpu("gfx942", 304, 64 << 10, 64 << 10, 2048, 32, 256 << 20, 5300e9, 2.1e9, warp=64,
               registers=131072), "MI300X"),
)  # fmt: skip

TARGETS = {
    target.name: target
    for target in (Target("cpu", "the processor of this machine, through TVM and LLVM", ("tir",)), *_GPUS)
}


def find(name: str) -> Target:
    """Return the target of that name. Raises ValueError, listing the known names, if there is none."""
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is unknown; there are {', '.join(sorted(TARGETS))}")
    return TARGETS[name]


def gpu_of(name: str) -> Gpu:
    """Return the GPU of a target. Raises ValueError for a target without one."""
    gpu = find(name).gpu
    if gpu is None:
        raise ValueError(f"target {name!r} is not a GPU")
    return gpu


def here() -> Target | None:
    """Return the target of this machine's GPU, with properties that the device reports, or None if there is no GPU.

    For an unknown GPU it is the target of the nearest architecture, with one warning.
    """
    import torch

    return _recognised(torch.cuda.current_device()) if torch.cuda.is_available() else None


@cache
def _recognised(device: int) -> Target:
    import torch

    properties = torch.cuda.get_device_properties(device)
    # Such as "gfx942:sramecc+:xnack-" on AMD; on NVIDIA it is the device's name.
    arch = properties.gcnArchName.partition(":")[0]
    if not arch.startswith("gfx"):
        arch = f"sm_{properties.major}{properties.minor}"
    most = getattr(properties, "shared_memory_per_block_optin", 0)  # which not every version of torch has
    return recognise(
        properties.name, arch, processors=properties.multi_processor_count, l2=properties.L2_cache_size,
        shared=properties.shared_memory_per_multiprocessor, threads=properties.max_threads_per_multi_processor,
        **({"shared_block": most} if most else {}),
    )  # fmt: skip


def device_of(target: str) -> str:
    """Return the name of this machine's device, under which its measurements are recorded.

    If ``target`` is a GPU and is not here, it is the target's name, which modelled records have.
    """
    if find(target).gpu is None:
        return cpu_name()
    found = here()
    if found is None or found.name != target:
        return target
    import torch

    return torch.cuda.get_device_name()


def recognise(device: str, arch: str, **properties: int) -> Target:
    """Return the target of a GPU with the name ``device``; ``properties`` override fields of its ``Gpu``."""
    # A digit must not follow the match: "A10" does not match an A100.
    found = next((target for target in _GPUS if re.search(rf"{target.matches}(?!\d)", device)), None)
    if found is None:
        found = min(_GPUS, key=lambda target: _distance(target, arch))
        warnings.warn(
            f"{device} ({arch}) is not in the table of targets; using the schedules of {found.name}"
            f" ({gpu_of(found.name).arch})", stacklevel=3,
        )  # fmt: skip
    return replace(found, gpu=replace(gpu_of(found.name), arch=arch, **properties))


def _distance(target: Target, arch: str) -> tuple[bool, int]:
    """Return the distance of an architecture from a target's; other vendors' are the furthest."""
    mine = gpu_of(target.name).arch
    numbers = [int(re.sub(r"\D", "", name)) for name in (mine, arch)]
    return mine[:3] != arch[:3], abs(numbers[0] - numbers[1])


def _cpu_fields() -> dict[str, str]:
    """Return what the system reports of its first processor."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    lines = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_features() -> frozenset[str]:
    """Return the processor's features by the system's names, such as "avx2"; none where the system reports none."""
    fields = _cpu_fields()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def cpu_vendor() -> str:
    """Return the processor's vendor as Linux calls it, such as "GenuineIntel"; empty where the system reports none."""
    return _cpu_fields().get("vendor_id", "")


@cache
def cpu_name() -> str:
    """Return the processor's model name and its widest vector extension, as far as the system reports them.

    On ARM, Linux has numbers of the implementer and the part in place of the name.
    """
    fields = _cpu_fields()
    numbers = [fields[name] for name in ("CPU implementer", "CPU part") if name in fields]
    name = fields.get("model name") or " ".join([platform.processor() or platform.machine(), *numbers])
    features = cpu_features()
    vectors = next((v for v in ("avx512f", "avx2", "avx", "sve", "asimd") if v in features), "")
    return f"{name} {vectors}".strip()


@cache
def cpu_digest() -> str:
    """Return a digest of the processor's name and features. Machine code is cached for exactly one such processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if info.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return hashlib.sha256("\n".join([platform.machine(), *lines]).encode()).hexdigest()[:12]
