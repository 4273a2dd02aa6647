"""From ops to kernels: ``lowering.use`` runs them, ``lowering.compile`` puts a model on them, ``lowering.lower``
makes one.

The way down, from what is called to what runs::

    use, compiled           ops on kernels; a model on kernels, and its other parts on torch.compile
    cpu                     the ops on a CPU's kernels
    gpu                     the ops on a GPU's kernels: Triton's, or through gpu_tir those of TIR
    kernels, offline        a workload to a kernel that runs here; to binaries for a GPU that need not be here
    model                   what a model's tokens take: on a CPU a layer in a kernel, and the head's product; on a GPU a
                            kernel of all heads, and a CUDA graph of all launches
    tir, triton             the kernels
    cuda, nvcc, driver      TIR to CUDA C, CUDA C to a binary, and its launch
    runtime                 TVM's part of running a CPU's kernels
    targets, work           the machines; what a launch does, and what its binary needs
"""

from lowering.compile import compile
from lowering.cpu.build import Kernel, lower
from lowering.targets import TARGETS, Target, find
from lowering.use import use

__all__ = ["TARGETS", "Kernel", "Target", "compile", "find", "lower", "use"]
