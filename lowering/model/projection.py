"""Linear layers that read their weights once, and fast, when a CPU has one token to decode.

torch's product of one row reaches 16 GB/s on two cores whose memory gives 36; the kernel of ``lowering/tir/project.py``
reaches 32. More rows than one, other types than float32 and gradients go to torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramnet.ops import registered

# By schema, as memory_step is: a call costs 5 µs of dispatch.
_LIBRARY = torch.library.Library("ramnet", "FRAGMENT")
_LIBRARY.define("project(Tensor x, Tensor weight, str kernels) -> Tensor")


def _project(x: Tensor, weight: Tensor, kernels: str) -> Tensor:
    return registered(kernels).project(x, weight)  # type: ignore[attr-defined]


_LIBRARY.impl("project", _project, "CPU")


@torch.library.register_fake("ramnet::project")
def _(x: Tensor, weight: Tensor, kernels: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Projection(nn.Linear):
    """A linear layer without bias that shares the weight of another."""

    def __init__(self, linear: nn.Linear, kernels: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.kernels = linear.weight, kernels
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        one_row = x.dim() == 3 and x.shape[0] == 1 and x.shape[1] == 1
        if one_row and not torch.is_grad_enabled() and x.dtype == self.weight.dtype == torch.float32:
            return torch.ops.ramnet.project(x, self.weight, self.kernels)
        return F.linear(x, self.weight)
