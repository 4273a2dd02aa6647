"""The interface of an op's launches on a GPU, which is the same for every compiler.

A plan can be run on this machine's GPU, compiled for a GPU that this machine need not have, or counted.
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
    """A kernel with its arguments and its grid of programs; ``work`` counts what it does.

    Its tensors are contiguous. They are meta tensors if the launch is only compiled or counted.
    """

    work: Work

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the kernel."""

    @abstractmethod
    def run(self, gpu: Gpu) -> None:
        """Queue the launch on the current stream of the current device, a ``gpu``; or run it on tensors on the CPU."""

    @abstractmethod
    def compile(self, gpu: Gpu) -> Compiled:
        """Compile the launch for ``gpu``."""


@dataclass(frozen=True)
class Plan:
    """The launches of an op, in order, and the tensors that hold its results afterwards.

    Results may have a wider dtype than the inputs.
    """

    launches: tuple[Launch, ...]
    outputs: tuple[Tensor, ...]

    def run(self, gpu: Gpu) -> tuple[Tensor, ...]:
        """Queue the launches on the outputs' device, which is a ``gpu``, and return the outputs."""
        with torch.cuda.device_of(self.outputs[0]):
            for launch in self.launches:
                launch.run(gpu)
        return self.outputs

    def compile(self, gpu: Gpu) -> list[Compiled]:
        """Compile each launch for ``gpu``, which this machine need not have. Errors of the compilers are not caught."""
        return [launch.compile(gpu) for launch in self.launches]

    def count(self) -> list[Work]:
        """Return the work of each launch."""
        return [launch.work for launch in self.launches]
