"""A model on tuned kernels, with the rest of it through torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lowering.use import backend_name
from ramnet.model import RamNetForCausalLM
from ramnet.ops import using


def compile(
    model: RamNetForCausalLM, target: str = "cpu", *, tuned: bool = True, backend: str = "inductor"
) -> RamNetForCausalLM:
    """A model that shares ``model``'s parameters, with its memory ops on the kernels of ``target`` and the rest
    through torch.compile.

    It is called, trained, sampled from and saved as before, and gives the same numbers within float32 rounding.
    Blocks are compiled one by one, without graph breaks, and those that do the same share one graph: 27 layers build
    as fast as the three kinds of CAPE among them. That happens at the first call of each kind (prefill, one token in
    place, training). ``backend`` is torch.compile's.

    Raises:
        ValueError: for an unknown target.
    """
    # Each kind of block has a graph for training, for prefill and for one token, each for B = 1 and above: past
    # torch's limit of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled = copy.copy(model)
    compiled.__class__ = _Compiled
    compiled.__dict__["kernels"] = backend_name(target, tuned, False)
    compiled._modules = dict(model._modules)
    for name in ("convs", "blocks"):
        compiled._modules[name] = torch.nn.ModuleList(_compiled_block(block, backend) for block in model._modules[name])  # type: ignore[union-attr]
    return compiled


class _Compiled(RamNetForCausalLM):
    kernels: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with using(self.kernels):
            return super().forward(*args, **kwargs)


def _compiled_block(block: torch.nn.Module, backend: str) -> torch.nn.Module:
    shared = copy.copy(block)  # the same parameters; only the call differs
    shared.compile(fullgraph=True, dynamic=True, backend=backend)
    return shared
