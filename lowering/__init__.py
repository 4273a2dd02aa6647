"""From ops to kernels: ``lowering.use`` runs them, ``lowering.compile`` puts a model on them, ``lowering.lower``
makes one."""

from lowering.compiled import compile
from lowering.kernels import Kernel, lower
from lowering.targets import TARGETS, Target, find
from lowering.use import use

__all__ = ["TARGETS", "Kernel", "Target", "compile", "find", "lower", "use"]
