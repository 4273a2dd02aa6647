"""The machines that kernels are lowered for."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """A machine by name, and what a compiler must know of it."""

    name: str
    description: str
    compiler: str  # the folder of lowering/ that serves it


TARGETS = {
    target.name: target for target in (Target("cpu", "the processor of this machine, through TVM and LLVM", "tir"),)
}


def find(name: str) -> Target:
    """The target of that name; ValueError, listing those known, where there is none."""
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is unknown; there are {', '.join(sorted(TARGETS))}")
    return TARGETS[name]


@cache
def cpu_name() -> str:
    """The processor's name as it calls itself, with a digest of its features where the system tells them."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    features = fields.get("flags") or fields.get("Features") or ""
    vectors = next((v for v in ("avx512f", "avx2", "avx", "sve", "asimd") if v in features.split()), "")
    return f"{name} {vectors}".strip()


@cache
def cpu_digest() -> str:
    """A short digest of the processor's name and all its features: machine code is shared only within one."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if info.is_file() else ""
    told = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:12]
