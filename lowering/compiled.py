"""A model on tuned kernels, with the rest of it through torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lowering.decoding import DecodeBlock
from lowering.projection import Projection
from lowering.use import backend_name
from ramnet.model import RamNetForCausalLM, RamNetOutput
from ramnet.ops import using
from ramnet.state import RamState


def compile(
    model: RamNetForCausalLM, target: str = "cpu", *, tuned: bool = True, backend: str = "inductor"
) -> RamNetForCausalLM:
    """A model that shares ``model``'s parameters, with its memory ops on the kernels of ``target`` and the rest
    through torch.compile.

    Single tokens in place are not compiled but run a layer in a kernel (``lowering.decoding``), or its linear layers.
    It is called, trained, sampled from and saved as before, and gives the same numbers within float32 rounding.
    Blocks are compiled one by one, without graph breaks, and those that do the same share one graph: 27 layers build
    as fast as the three kinds of CAPE among them. That happens at the first call of each kind (prefill,
    training). ``backend`` is torch.compile's.

    Raises:
        ValueError: for an unknown target.
    """
    # Each kind of block has a graph for training and for prefill, each for B = 1 and above: past torch's limit of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    kernels = backend_name(target, tuned, False)
    compiled = _shared(model, kernels)
    compiled.__class__ = _Compiled
    # One token has too little work to compile: 27 graphs a token cost more in guards than they save in passes.
    step = _shared(model, kernels)
    if kernels:
        step._modules["blocks"] = torch.nn.ModuleList(DecodeBlock(block, kernels) for block in step.blocks)
    compiled.__dict__.update(kernels=kernels, step=step)
    for block in (*compiled.convs, *compiled.blocks):
        block.compile(fullgraph=True, dynamic=True, backend=backend)
    return compiled


class _Compiled(RamNetForCausalLM):
    kernels: str
    step: RamNetForCausalLM

    def forward(self, input_ids: Tensor, state: RamState | None = None, *, in_place: bool = False) -> RamNetOutput:
        with using(self.kernels):
            if in_place:
                return self.step(input_ids, state, in_place=True)
            return super().forward(input_ids, state)


def _shared(module: Any, kernels: str) -> Any:
    """A module of the same parameters whose layers without bias decode through the kernels, where there are some."""
    if kernels and type(module) is torch.nn.Linear and module.bias is None:
        return Projection(module, kernels)
    shared = copy.copy(module)
    shared._modules = {name: child and _shared(child, kernels) for name, child in module._modules.items()}
    return shared
