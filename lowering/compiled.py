"""A model on tuned kernels, with the rest of it through torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowering import targets
from lowering.decode_heads import HeadsBlock
from lowering.decoding import DecodeBlock
from lowering.graphs import TokenGraphs
from lowering.projection import Projection
from lowering.use import backend_name, interpreted
from ramnet.model import RamNetForCausalLM, RamNetOutput
from ramnet.ops import using
from ramnet.state import RamState


def compile(
    model: RamNetForCausalLM, target: str | None = None, *, tuned: bool = True, backend: str = "inductor"
) -> RamNetForCausalLM:
    """A model that shares ``model``'s parameters, with its memory ops on the kernels of ``target`` and the rest
    through torch.compile.

    It is called, trained, sampled from and saved as before, and gives the same numbers within rounding. Blocks are
    compiled one by one, without graph breaks, and those that do the same share one graph: 27 layers build as fast as
    the three kinds of CAPE among them. That happens at the first call of each kind (prefill, training).

    Single tokens in place go another way. On the CPU they are not compiled but run a layer in a kernel
    (``lowering.decoding``), or its linear layers. On a GPU each head's addresses, write and read are one kernel
    (``lowering.decode_heads``), the rest is compiled, and all of a token is replayed from a CUDA graph
    (``lowering.graphs``) that is recorded at the first token of each state.

    Args:
        target: a name of ``lowering.TARGETS``; None takes the GPU that is here where ``model`` is on one, else the CPU.
        tuned: take the schedules of the records, else the defaults.
        backend: torch.compile's.

    Raises:
        ValueError: for an unknown target, or a model that is not where the target's kernels run.
        RuntimeError: for a GPU where there is none. Without TVM, or Triton, the reference runs, and a warning says so
            once.
    """
    # Each kind of block has a graph for training and for prefill, each for B = 1 and above: past torch's limit of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    found = _target(model, target)
    kernels = backend_name(found.name, tuned, False)
    if found.gpu is not None:
        return _on_gpu(model, kernels, backend)
    compiled, step = _shared(model, kernels), _shared(model, kernels)
    if kernels:
        step._modules["blocks"] = nn.ModuleList(DecodeBlock(block, kernels) for block in step.blocks)
    # One token has too little work to compile: 27 graphs a token cost more in guards than they save in passes.
    for block in (*compiled.convs, *compiled.blocks):
        block.compile(fullgraph=True, dynamic=True, backend=backend)
    return _finished(compiled, kernels, step, None)


def _on_gpu(model: RamNetForCausalLM, kernels: str, backend: str) -> RamNetForCausalLM:
    compiled, step = _shared(model, ""), _shared(model, "")
    if not kernels:  # without Triton, neither can torch.compile write code for a GPU
        return _finished(compiled, kernels, step, None)
    step._modules["blocks"] = nn.ModuleList(HeadsBlock(block, kernels) for block in step.blocks)
    # Sizes that stay (training, a token) are compiled in, and those that change get one graph more for all.
    for block in (*compiled.convs, *compiled.blocks, *step.convs, *step.blocks):
        block.compile(fullgraph=True, dynamic=None, backend=backend)
    return _finished(compiled, kernels, step, None if interpreted() else TokenGraphs(step))


def _finished(compiled: Any, kernels: str, step: RamNetForCausalLM, graphs: TokenGraphs | None) -> RamNetForCausalLM:
    compiled.__class__ = _Compiled
    compiled.__dict__.update(kernels=kernels, step=step, graphs=graphs)
    return compiled


class _Compiled(RamNetForCausalLM):
    kernels: str
    step: RamNetForCausalLM
    graphs: TokenGraphs | None

    def forward(self, input_ids: Tensor, state: RamState | None = None, *, in_place: bool = False) -> RamNetOutput:
        with using(self.kernels):
            if not in_place:
                return super().forward(input_ids, state)
            if self.graphs is not None and state is not None and self.graphs.serve(input_ids):
                return RamNetOutput(self.graphs(input_ids, state), state)
            return self.step(input_ids, state, in_place=True)


def _target(model: RamNetForCausalLM, name: str | None) -> targets.Target:
    """The target of that name, or of where the model is; ValueError where its kernels cannot reach the model."""
    device = model.embedding.weight.device
    if name is None:
        return (targets.here() if device.type == "cuda" else None) or targets.find("cpu")
    found = targets.find(name)
    needed = "cpu" if found.gpu is None else "cuda"
    # Triton's interpreter takes any tensor; and with no GPU at all, the backend says that.
    reached = device.type == needed or (needed == "cuda" and (interpreted() or not torch.cuda.is_available()))
    if not reached:
        raise ValueError(f"the model is on {device} but target {name!r} runs on {needed}: move it there first")
    return found


def _shared(module: Any, kernels: str) -> Any:
    """A module of the same parameters whose layers without bias decode through the kernels, where there are some."""
    if kernels and type(module) is nn.Linear and module.bias is None:
        return Projection(module, kernels)
    shared = copy.copy(module)
    shared._modules = {name: child and _shared(child, kernels) for name, child in module._modules.items()}
    return shared
