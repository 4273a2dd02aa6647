"""What computes an op on a GPU, whichever compiler makes its kernels.

It is run where there is a GPU, compiled for one that need not be here, or counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowering.gpu.resources import Compiled, Work

if TYPE_CHECKING:
    from lowering.targets import Gpu


class Launch(ABC):
    """A kernel on a grid of programs, as a value; ``work`` is what it does.

    Its tensors are contiguous, and on the meta device where the launch is only compiled or counted.
    """

    work: Work

    @property
    @abstractmethod
    def name(self) -> str:
        """The kernel's."""

    @abstractmethod
    def run(self, gpu: Gpu) -> None:
        """Queue it on the current stream of the current device, which is a ``gpu``; or run it, on the CPU's tensors."""

    @abstractmethod
    def compile(self, gpu: Gpu) -> Compiled:
        """Compile for ``gpu`` what ``run`` would run there."""


@dataclass(frozen=True)
class Plan:
    """The launches of an op, in order, and the tensors that hold its results once they ran.

    Results may have a wider type than the inputs.
    """

    launches: tuple[Launch, ...]
    outputs: tuple[Tensor, ...]

    def run(self, gpu: Gpu) -> tuple[Tensor, ...]:
        """Queue the launches on the outputs' device, which is a ``gpu``; the outputs."""
        with torch.cuda.device_of(self.outputs[0]):
            for launch in self.launches:
                launch.run(gpu)
        return self.outputs

    def compile(self, gpu: Gpu) -> list[Compiled]:
        """Each launch, compiled for a GPU that need not be here. Compilers' errors pass through."""
        return [launch.compile(gpu) for launch in self.launches]

    def count(self) -> list[Work]:
        """What each launch does."""
        return [launch.work for launch in self.launches]
