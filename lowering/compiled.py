"""A model on tuned kernels, with the rest of it through torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lowering import targets
from lowering.gpu.compilers import interpreted
from lowering.model import decode_block, heads_block, projection
from lowering.model.token_graphs import TokenGraphs
from lowering.model.untouched import is_hooked
from lowering.use import backend_name
from ramnet.model import RamNetForCausalLM, RamNetOutput
from ramnet.ops import using
from ramnet.sequences import Sequences
from ramnet.state import RamState

# Each kind of block has a graph for training, for prefill and for inference mode, each for B = 1 and above; torch's
# own limit is 8.
_GRAPHS = 64


def compile(
    model: RamNetForCausalLM, target: str | None = None, *, tuned: bool = True, backend: str = "inductor"
) -> RamNetForCausalLM:
    """Another face of ``model``: the same modules and parameters, with its memory ops on the kernels of ``target`` and
    the rest through torch.compile.

    It is called, trained, sampled from and saved as before, from any thread, and gives the same numbers within
    rounding. Blocks are compiled one by one, without graph breaks, and those that do the same share one graph: 27
    layers build as fast as the three kinds of CAPE among them. That happens at the first call of each kind (prefill,
    training).

    Single tokens in place go another way. On the CPU they are not compiled but run a layer in a kernel
    (``lowering.model.decode_block``). On a GPU each head's addresses, write and read are one kernel
    (``lowering.model.heads_block``), the rest is compiled, and all of a token is replayed from a CUDA graph
    (``lowering.model.token_graphs``) that is recorded at the first token of each state.

    Whatever is done to ``model`` afterwards is heard: weights loaded or replaced, adapters put in the place of its
    layers, parametrisations, hooks. What no kernel or graph knows is called as the module it is.

    Args:
        target: a name of ``lowering.TARGETS``; None takes the GPU that is here where ``model`` is on one, else the CPU.
        tuned: take the schedules of the records, else the defaults.
        backend: torch.compile's.

    Raises:
        ValueError: for an unknown target, or a model that is not where the target's kernels run.
        RuntimeError: for a GPU where there is none. Without TVM, or Triton, the reference runs, and a warning says so
            once.
    """
    if isinstance(model, _CompiledModel):
        model = model.original
    found = _target(model, target)
    kernels = backend_name(found.name, tuned, False)
    # The model's own class stays the base, so that what a user's sub-class overrides goes on to be called.
    kind: Any = type(f"Compiled{type(model).__name__}", (_CompiledModel, type(model)), {})
    made: RamNetForCausalLM = kind(model, kernels, found.gpu is not None, (target, tuned, backend))
    return made


class _CompiledModel(RamNetForCausalLM):
    """Runs a model's convolutions, blocks and head by other means than calling them, where they are as they were made.

    ``kernels`` names the backend and is empty where there is none.
    """

    original: RamNetForCausalLM
    kernels: str
    on_gpu: bool
    how: tuple[str | None, bool, str]
    compiled: Callable[..., Any]
    compiled_token: Callable[..., Tensor]
    graphs: TokenGraphs | None

    def __init__(self, model: RamNetForCausalLM, kernels: str, on_gpu: bool, how: tuple[str | None, bool, str]) -> None:
        # The very dictionaries of the model's modules, parameters and hooks: what changes there has changed here. The
        # model itself goes past nn.Module, which would put it among its own modules.
        self.__dict__.update(model.__dict__, original=model)
        self.__dict__.pop("_compiled_call_impl", None)
        self.kernels, self.on_gpu, self.how = kernels, on_gpu, how
        # On a GPU sizes that stay (training, a token) are compiled in, and those that change get a graph for all.
        options: dict[str, Any] = {"fullgraph": True, "dynamic": None if on_gpu else True, "backend": how[2]}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options["recompile_limit"] = _GRAPHS
        else:  # this version of torch has one limit, for all that is compiled
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        # Without Triton, torch.compile cannot write code for a GPU either.
        self.compiled = torch.compile(_own(_call), **options) if kernels or not on_gpu else _call
        self.compiled_token = torch.compile(_own(heads_block.decode), **options)
        self.graphs = TokenGraphs(self, self._token) if on_gpu and kernels and not interpreted() else None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, and what a pickle is loaded as, is the copied model compiled again."""
        return _again, (self.original, *self.how)

    def forward(
        self, input_ids: Tensor, state: RamState | None = None, *, in_place: bool = False, **options: Any
    ) -> RamNetOutput:
        plain = options.get("attention_mask") is None and options.get("cu_seqlens") is None
        graphs = self.graphs if in_place and plain else None
        if graphs is not None and state is not None and graphs.serve(input_ids):
            return RamNetOutput(graphs(input_ids, state), state)
        return super().forward(input_ids, state, in_place=in_place, **options)

    def _token(self, input_ids: Tensor, state: RamState) -> Tensor:
        return super().forward(input_ids, state, in_place=True).logits

    def hidden_states(
        self, input_ids: Tensor, state: RamState | None = None, **options: Any
    ) -> tuple[Tensor, RamState]:
        with using(self.kernels):
            return super().hidden_states(input_ids, state, **options)

    def run_conv(
        self, conv: nn.Module, x: Tensor, recent: Tensor, in_place: bool, sequences: Sequences | None
    ) -> tuple[Tensor, Tensor]:
        # One token has too little work to compile on a CPU: guards cost more than they save in passes.
        by: Any = _call if in_place and not self.on_gpu else self._by_graph
        return by(conv, x, recent, sequences)

    def run_block(
        self, block: nn.Module, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool,
        sequences: Sequences | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        by_kernel = in_place and bool(self.kernels)
        plain = by_kernel and sequences is None
        if by_kernel and not self.on_gpu:
            found = decode_block.decode(block, x, memory, mass, position, self.kernels) if plain else None
            return block(x, memory, mass, position, True, sequences) if found is None else (found, memory, mass)
        if plain and heads_block.serves(block, memory, mass) and not is_hooked(block):
            return self.compiled_token(block, x, memory, mass, position, self.kernels), memory, mass
        return self._by_graph(block, x, memory, mass, position, in_place, sequences)

    def run_head(self, hidden: Tensor) -> Tensor:
        found = projection.project(self.head, hidden, self.kernels) if self.kernels and not self.on_gpu else None
        return self.head(hidden) if found is None else found

    def _by_graph(self, module: nn.Module, *inputs: Any) -> Any:
        # A caller who compiles the whole has this inlined.
        if torch.compiler.is_compiling() or is_hooked(module):
            return module(*inputs)
        return self.compiled(module, *inputs)


def _call(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def _own(function: Any) -> Any:
    """The function with a code object of its own, to which torch.compile binds its graphs and their limits."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _again(model: RamNetForCausalLM, target: str | None, tuned: bool, backend: str) -> RamNetForCausalLM:
    return compile(model, target, tuned=tuned, backend=backend)


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
