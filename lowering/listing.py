"""The code of a kernel at each stage of its compilation."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lowering.targets import find, gpu_of
from schedules.workload import Workload

# The languages of each compiler; the first is the default.
LANGUAGES = {
    "llvm": ("tir", "llvm", "asm"),
    "tir": ("cuda", "tir", "ptx", "asm"),
    "triton": ("ptx", "llvm", "asm"),
}


def listing(workload: Workload, target: str, schedule: Any, language: str | None = None) -> str:
    """Return the code of the kernel of ``workload`` for ``target`` under ``schedule``.

    Args:
        language: "tir", "llvm", "asm", "ptx" or "cuda"; None is the compiler's first.

    Raises:
        ValueError: if the schedule's compiler has no such stage, and as ``lowering.lower`` and
            ``lowering.gpu.offline.compile_for`` do.
    """
    schedule.require(workload)
    compiler = "llvm" if find(target).gpu is None else schedule.compiler
    languages = LANGUAGES[compiler]
    if compiler == "triton" and gpu_of(target).backend == "hip":
        languages = ("asm", "llvm")
    language = language or languages[0]
    if language not in languages:
        raise ValueError(f"{workload.op} on {target} has no {language}; it has {', '.join(languages)}")
    return {"llvm": _of_cpu, "tir": _of_tir, "triton": _of_triton}[compiler](workload, target, schedule, language)


def _of_cpu(workload: Workload, target: str, schedule: Any, language: str) -> str:
    from lowering.cpu.build import compile_now
    from lowering.cpu.templates import TEMPLATES

    if language == "tir":
        return str(TEMPLATES[workload.op](workload, schedule).script())
    return str(compile_now(workload, schedule).mod.inspect_source({"llvm": "ll", "asm": "s"}[language]))


def _of_tir(workload: Workload, target: str, schedule: Any, language: str) -> str:
    from lowering.gpu.kernels import plan
    from lowering.gpu.offline import arguments
    from lowering.gpu.tir import TirLaunch
    from lowering.nvcc import compile_cuda, ptx

    launch = plan(workload.op, schedule, *arguments(workload)).launches[0]
    assert isinstance(launch, TirLaunch)
    if language == "tir":
        return str(launch.kernels.module(cuda=True).script())
    gpu = gpu_of(target)
    text = launch.kernels.source(gpu).text
    if language == "cuda":
        return text
    return ptx(text, gpu.arch) if language == "ptx" else _machine_code(compile_cuda(text, gpu.arch)[0])


def _of_triton(workload: Workload, target: str, schedule: Any, language: str) -> str:
    from lowering.gpu.kernels import plan
    from lowering.gpu.offline import arguments
    from lowering.gpu.triton.launch import TritonLaunch

    gpu = gpu_of(target)
    stage = {"ptx": "ptx", "llvm": "llir", "asm": "amdgcn" if gpu.backend == "hip" else "cubin"}[language]
    texts = []
    for launch in plan(workload.op, schedule, *arguments(workload)).launches:
        assert isinstance(launch, TritonLaunch)
        made = launch.binary(gpu)
        code = _machine_code(made.cubin) if stage == "cubin" else made.asm[stage]
        texts.append(f"// {launch.name}\n{code}")
    return "\n".join(texts)


def _machine_code(cubin: bytes) -> str:
    """Disassemble a cubin with ``cuobjdump -sass``."""
    from lowering.gpu.triton_compiler import tool

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool("cuobjdump"), "-sass", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
