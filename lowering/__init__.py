"""From ops to kernels: ``lowering.use`` runs the ops on kernels, ``lowering.compile`` puts a model on them, and
``lowering.lower`` builds one kernel for a CPU.

What is where::

    use, compiled       ops on kernels within a block; a model on kernels, its other parts through torch.compile
    targets, cache      the machines; compiled kernels on disk
    model/              what lowering.compile runs in place of a model's blocks and head
    cpu/                backend (tensors in, tensors out), build, runtime, and one TIR template per op
    gpu/                backend, plan (launches as values), offline (compiling without a GPU), races, resources,
                        and one folder per op: triton.py, tir.py, work.py; the scan has a folder per form
    gpu/cuda/           TIR to CUDA C to a binary, and its launch
    emit                loops and expressions that all TIR templates share
"""

from lowering.compiled import compile
from lowering.cpu.build import Kernel, lower
from lowering.targets import TARGETS, Target, find
from lowering.use import use

__all__ = ["TARGETS", "Kernel", "Target", "compile", "find", "lower", "use"]
