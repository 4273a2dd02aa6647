"""Compiles Triton kernels for a GPU that this machine need not have, and reads the binaries' resources."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowering.gpu.cuda.ptxas import spilled_bytes
from lowering.gpu.resources import Resources

if TYPE_CHECKING:
    from triton.compiler import ASTSource

    from lowering.targets import Gpu


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. ``asm`` is the code of each stage, such as "ttgir", "ptx" or "amdgcn"; ``cubin`` is empty on
    AMD."""

    name: str
    asm: dict[str, str]
    resources: Resources
    cubin: bytes = b""


def compile_source(source: ASTSource, threads: int, gpu: Gpu) -> Binary:
    """Compile a kernel for ``gpu``, with programs of ``threads`` threads.

    Raises ValueError if a program is smaller than a warp. Errors of Triton are not caught.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if threads < gpu.warp or threads % gpu.warp:
        raise ValueError(f"{source.name} has programs of {threads} threads; {gpu.arch} needs a multiple of {gpu.warp}")
    arch: Any = gpu.arch if gpu.backend == "hip" else int(gpu.arch.removeprefix("sm_"))
    options = {"num_warps": threads // gpu.warp}
    compiled = triton.compile(source, target=GPUTarget(gpu.backend, arch, gpu.warp), options=options)
    texts = {stage: text for stage, text in compiled.asm.items() if isinstance(text, str)}
    if gpu.backend == "hip":
        resources = amd_resources(texts["amdgcn"])
    else:
        found = cubin_resources(compiled.asm["cubin"], tool("cuobjdump"))[compiled.metadata.name]
        frame = found["STACK"] + found["LOCAL"]
        spilled = _spilled(texts["ptx"], arch) if frame else 0
        resources = Resources(found["REG"], spilled, frame, compiled.metadata.shared)
    return Binary(source.name, texts, resources, compiled.asm.get("cubin", b""))


def cubin_resources(cubin: bytes, cuobjdump: str) -> dict[str, dict[str, int]]:
    """Return the resources of a cubin by function: "REG" (registers per thread), and "STACK" and "SHARED" (bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        printed = subprocess.run([cuobjdump, "-res-usage", str(path)], check=True, capture_output=True, text=True)
    return resource_usage(printed.stdout + printed.stderr)


def resource_usage(printed: str) -> dict[str, dict[str, int]]:
    """Parse the output of ``cuobjdump -res-usage`` by function."""
    usage = re.findall(r"Function (\S+?):\s+(REG:.*)", printed)
    return {name: {key: int(n) for key, n in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)} for name, line in usage}


def amd_resources(amdgcn: str) -> Resources:
    """Read the resources of a kernel from the metadata in AMD assembly code, which has one kernel."""

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", amdgcn, re.MULTILINE)
        if found is None:
            raise ValueError(f"the compiled kernel's metadata has no {name}")
        return int(found[1])

    return Resources(
        registers=field("vgpr_count"), spilled=4 * field("vgpr_spill_count"),
        local=field("private_segment_fixed_size"), shared=field("group_segment_fixed_size"),
    )  # fmt: skip


def _spilled(ptx: str, capability: int) -> int:
    import triton

    suffix = "a" if capability >= 90 else ""
    # The register allocation level that Triton passes to ptxas 13.
    level = ["--regAllocOptLevel=2"] if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [
            tool("ptxas_blackwell" if capability >= 100 else "ptxas"), "-v", "-lineinfo", *level,
            f"--gpu-name=sm_{capability}{suffix}", str(path), "-o", os.devnull,
        ]  # fmt: skip
        printed = subprocess.run(command, check=True, capture_output=True, text=True)
    return spilled_bytes(printed.stdout + printed.stderr)


def tool(name: str) -> str:
    """Return the path of a program in Triton's package."""
    import triton

    return str(getattr(triton.knobs.nvidia, name).path)
