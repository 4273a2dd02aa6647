"""Kernels for the ops: ``lowering.use`` runs ops on them, ``lowering.compile`` runs a model on them, and
``lowering.lower`` builds one kernel for a CPU.

Contents::

    backends, compiled  the context manager and the compiled model
    targets, cache      the supported machines; the disk cache of compiled kernels
    model/              replaces a model's blocks and head in lowering.compile
    cpu/                backend, build, runtime, and one TIR template per op
    gpu/                backend, plan (the launches of an op), offline (compiling without a GPU), races, resources,
                        and one folder per op: triton.py and tir.py (plans), template.py (TIR's kernel), work.py;
                        the scan has one folder per form
    gpu/cuda/           compiles TIR to CUDA C and a cubin, and launches it
    emit                loops and expressions that the TIR templates share
"""

from typing import TYPE_CHECKING

from ramnet.lazy import attributes

if TYPE_CHECKING:
    from lowering.backends import use
    from lowering.compiled import compile, plain
    from lowering.cpu.build import Kernel, lower
    from lowering.targets import TARGETS, Target, find

__all__ = ["TARGETS", "Kernel", "Target", "compile", "find", "lower", "plain", "use"]

# torch is imported with the first name that needs it, so that the command line can print its help without it.
__getattr__, __dir__ = attributes(
    __name__,
    {
        "TARGETS": "lowering.targets",
        "Kernel": "lowering.cpu.build",
        "Target": "lowering.targets",
        "compile": "lowering.compiled",
        "find": "lowering.targets",
        "lower": "lowering.cpu.build",
        "plain": "lowering.compiled",
        "use": "lowering.backends",
    },
)
