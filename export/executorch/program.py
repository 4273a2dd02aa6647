"""Lowers one token of a model, and the reset of its state, to an ExecuTorch program."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.executorch.operators import PlainOperators
from export.libraries import quiet
from export.model import evaluating
from ramnet import RamNetConfig, RamNetForCausalLM, RamState

TOKEN, RESET, CONFIG = "forward", "reset", "config"


class StateBuffers(nn.Module):
    """The state before the first token of one row, in buffers named as in ``RamState.tensors``.

    Memory is [H·M, D] and mass [H·M], as ``PlainOperators`` needs them. Each subclass is a method of the program; all
    methods share the buffers, because they have the same names.
    """

    position: Tensor

    def __init__(self, config: RamNetConfig) -> None:
        super().__init__()
        self.config = config
        for name, value in RamState.zeros(config, 1).tensors().items():
            *kind, last = name.split(".")
            owner: nn.Module = self
            if kind:
                if not hasattr(self, kind[0]):
                    self.add_module(kind[0], nn.Module())
                owner = getattr(self, kind[0])
            owner.register_buffer(last, value.flatten(0, 2) if kind in (["memory"], ["mass"]) else value)

    def layers(self, kind: str) -> list[Tensor]:
        """Return the buffers of "memory", "mass" or "conv"."""
        return list(getattr(self, kind).buffers()) if hasattr(self, kind) else []


class Token(StateBuffers):
    """Reads one token with the model as it is."""

    def __init__(self, model: RamNetForCausalLM) -> None:
        super().__init__(model.config)
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [1, 1, V] of ids [1, 1]."""
        flat = {}
        state = RamState([], [], self.layers("conv"), self.position)
        for kind in ("memory", "mass"):
            for c, buffer in zip(self.config.layers, self.layers(kind), strict=True):
                view = buffer.view(1, c.num_heads, c.slots, *([c.value_dim] if kind == "memory" else []))
                flat[id(view)] = buffer
                getattr(state, kind).append(view)
        with PlainOperators(flat):
            logits: Tensor = self.model(ids, state, in_place=True).logits
        return logits


class Reset(StateBuffers):
    """Resets the state to that before the first token."""

    def forward(self) -> Tensor:
        """Return the position, 0 [1]; a method needs an output."""
        for buffer in (*self.layers("memory"), *self.layers("conv")):
            buffer.zero_()
        for layer, buffer in zip(self.config.layers, self.layers("mass"), strict=True):
            buffer.fill_(1 / layer.slots)
        return self.position.zero_().clone()


def write(token: StateBuffers, path: Path) -> None:
    """Write the program with the methods "forward", "reset" and "config", the model's configuration as JSON."""
    with _silenced(), torch.no_grad():
        from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        with evaluating(token):
            exported = {
                TOKEN: torch.export.export(token, (torch.zeros(1, 1, dtype=torch.int64),)),
                RESET: torch.export.export(Reset(token.config), ()),
            }
        # Products only: a token of "tiny" then takes 145 µs instead of 171, as each group of other operators would be a
        # call of XNNPACK of its own.
        products = XnnpackPartitioner(configs=[LinearConfig, AddmmConfig, MMConfig])
        constants: dict[str, Any] = {CONFIG: token.config.to_json()}
        edge = to_edge_transform_and_lower(exported, partitioner=[products], constant_methods=constants)
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                passes=[_initial_state()],
                memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
                run_reinplace_pass=True,
                emit_mutable_buffer_names=True,
            )
        )
        with path.open("wb") as file:
            program.write_to_file(file)


def _initial_state() -> Any:
    """Return the pass that stores the buffers' initial values in the method that reads tokens.

    Without it, mutable buffers start with any values. In the other method, which shares the buffers, they would be
    stored again, and loading that method would reset the state.
    """
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
    from torch.fx.passes.infra.pass_base import PassResult

    class InitialState(InitializedMutableBufferPass):
        def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
            names = {node.name for node in graph_module.graph.nodes if node.op == "placeholder"}
            return super().call(graph_module) if "ids" in names else PassResult(graph_module, False)

    return InitialState(["b_memory_", "b_mass_", "b_conv_", "b_position"])


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress the warnings of PyTorch and ExecuTorch about their own parts."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    with warnings.catch_warnings(), quiet("torchao"), quiet("torch.utils._pytree"), quiet("executorch"):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.handlers[:] = handlers  # an import adds one to the root logger
