"""``lowering.compile``: a model on tuned kernels, its other parts compiled by torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lowering import targets
from lowering.backends import backend_name
from lowering.gpu.compilers import interpreted
from lowering.model import heads_block, huge_pages
from lowering.model.token import Token
from lowering.model.token_graphs import TokenGraphs
from lowering.model.untouched import COMPUTING, is_hooked
from ramnet.model import RamNetForCausalLM, RamNetOutput
from ramnet.ops import using
from ramnet.sequences import Sequences
from ramnet.state import RamState

# The limit on graphs of a function: a kind of block has one for training, one for prefill and one for inference mode,
# each for B = 1 and B > 1. torch's default limit is 8.
_GRAPHS = 64


def compile(
    model: RamNetForCausalLM, target: str | None = None, *, tuned: bool = True, backend: str = "inductor"
) -> RamNetForCausalLM:
    """Return a model that shares the modules and parameters of ``model``, runs its memory ops on the kernels of
    ``target``, and compiles the rest with torch.compile.

    It is called, trained, sampled from and saved like ``model``, from any thread, and gives the same results up to
    rounding. Each block is compiled by itself, without graph breaks, at the first call of each kind (prefill,
    training). Blocks that compute the same share a graph, so 27 layers compile as fast as the three kinds of CAPE among
    them.

    Single tokens and short prompts take another path. On a CPU, a token of each sequence, or a short prompt of one, is
    one call of a library that is compiled for the model (``lowering.model.token``); if a module was changed, each block
    that was not is one call. It needs float32 and a C compiler. On a GPU, the heads' addresses, writes and
    reads are one kernel (``lowering.model.heads_block``), the rest is compiled, and the whole token is replayed from a
    CUDA graph (``lowering.model.token_graphs``) that is recorded at the first token of each state.

    Later changes of ``model`` take effect: weights that are loaded or replaced, adapters that replace layers,
    parametrisations, hooks and, but for tokens that a GPU replays, settings of a subclass. A module that was changed
    such that no kernel or graph fits it is called directly.

    Args:
        target: a name in ``lowering.TARGETS``; None selects the GPU of this machine if ``model`` is on one, else "cpu".
        tuned: use the tuned schedules of the records; if False, the default schedules.
        backend: the backend of torch.compile.

    Raises:
        TypeError: if ``model`` is not a ``RamNetForCausalLM``, which one of transformers has as its ``ramnet``.
        ValueError: if the target is unknown, or ``model`` is on another device than the target's kernels.
        RuntimeError: if the target is a GPU and this machine has none. If TVM or Triton is not installed, the reference
            runs instead, with one warning.
    """
    if not isinstance(model, RamNetForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}; it must be a RamNetForCausalLM")
    model = plain(model)
    found = _target(model, target)
    kernels = backend_name(found.name, tuned, False)
    # Derived from the model's own class, so that methods which a user's subclass overrides are still called.
    base = type(model)
    own = {name: _of_original(name) for name in _settings(base)}
    if not _takes_all(base.forward):
        own["forward"] = base.forward
    kind: Any = type(f"Compiled{base.__name__}", (_CompiledModel, base), own)
    made: RamNetForCausalLM = kind(model, kernels, found.gpu is not None, (target, tuned, backend))
    return made


def plain(model: RamNetForCausalLM) -> RamNetForCausalLM:
    """Return the model that ``compile`` was given, if ``model`` is its result, else ``model``."""
    return model.original if isinstance(model, _CompiledModel) else model


def _settings(kind: type[RamNetForCausalLM]) -> list[str]:
    """Return the names of what classes derived from ``RamNetForCausalLM`` hold besides methods and properties."""
    derived = kind.__mro__[: kind.__mro__.index(RamNetForCausalLM)]
    held = [item for each in derived for item in vars(each).items() if not item[0].startswith("__")]
    return [name for name, value in held if not callable(value) and not hasattr(type(value), "__get__")]


def _of_original(name: str) -> Any:
    """Return a property that reads and sets an attribute of the original model."""
    return property(lambda self: getattr(self.original, name), lambda self, value: setattr(self.original, name, value))


class _CompiledModel(RamNetForCausalLM):
    """Runs convolutions, blocks and the head of ``original`` as graphs or kernels, if the modules are unchanged.

    ``_kernels`` is the name of the backend, or empty for the reference.
    """

    original: RamNetForCausalLM
    _kernels: str
    _on_gpu: bool
    _how: tuple[str | None, bool, str]
    _compiled: Callable[..., Any]
    _compiled_token: Callable[..., Tensor]
    _graphs: TokenGraphs | None
    _token: Token | None

    def __init__(self, model: RamNetForCausalLM, kernels: str, on_gpu: bool, how: tuple[str | None, bool, str]) -> None:
        # Share the model's dictionaries of modules, parameters and hooks, so that changes to them take effect here.
        # ``original`` bypasses nn.Module.__setattr__, which would register the model as a submodule of itself.
        own = vars(model)
        shared = {name: own[name] for name, held in vars(nn.Module()).items() if isinstance(held, dict | set)}
        kind = type(model)
        methods = {name: x for name, x in own.items() if callable(getattr(kind, name, None)) and name not in COMPUTING}
        self.__dict__.update(shared, **methods, original=model)
        self._kernels, self._on_gpu, self._how = kernels, on_gpu, how
        # On a GPU, sizes are compiled as constants until they change, and then become dynamic.
        options: dict[str, Any] = {"fullgraph": True, "dynamic": None if on_gpu else True, "backend": how[2]}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options["recompile_limit"] = _GRAPHS
        else:  # this version of torch has only a global limit
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        # Without Triton, torch.compile cannot generate code for a GPU either.
        self._compiled = torch.compile(_own(_call), **options) if kernels or not on_gpu else _call
        self._compiled_token = torch.compile(_own(heads_block.decode), **options)
        self._graphs = TokenGraphs(self, self._read_token) if on_gpu and kernels and not interpreted() else None
        self._token = Token(model) if kernels and not on_gpu else None
        if self._token is not None:
            huge_pages.collapse(model.parameters())

    # What is not shared is the original model's: its configuration, whether it trains, and settings of a subclass.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    config = _of_original("config")
    training = _of_original("training")
    _is_full_backward_hook = _of_original("_is_full_backward_hook")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the original model, as its ``save_pretrained`` does."""
        self.original.save_pretrained(directory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copying and unpickling compile a copy of the original model."""
        return _again, (self.original, *self._how)

    def forward(
        self, input_ids: Tensor, state: RamState | None = None, *, in_place: bool = False, **options: Any
    ) -> RamNetOutput:
        if not COMPUTING.isdisjoint(vars(self.original)):  # it is called itself
            with using(self._kernels):
                return self.original.forward(input_ids, state, in_place=in_place, **options)
        plain = options.get("attention_mask") is None and options.get("cu_seqlens") is None
        graphs = self._graphs if in_place and plain else None
        if graphs is not None and state is not None and graphs.serve(input_ids):
            return RamNetOutput(graphs(input_ids, state), state)
        if self._token is not None and (kept := _kept(**options)) is not None:
            found = self._token.read(input_ids, state, in_place, kept)
            if found is not None:
                return found
        return super().forward(input_ids, state, in_place=in_place, **options)

    def _read_token(self, input_ids: Tensor, state: RamState) -> Tensor:
        return super().forward(input_ids, state, in_place=True).logits

    def hidden_states(
        self, input_ids: Tensor, state: RamState | None = None, **options: Any
    ) -> tuple[Tensor, RamState]:
        with using(self._kernels):
            return super().hidden_states(input_ids, state, **options)

    def _call_conv(
        self, conv: nn.Module, x: Tensor, recent: Tensor, in_place: bool, sequences: Sequences | None
    ) -> tuple[Tensor, Tensor]:
        # For one token on a CPU, checking a graph's guards takes longer than the compiled code saves.
        by: Any = _call if in_place and not self._on_gpu else self._by_graph
        return by(conv, x, recent, sequences)

    def _call_block(
        self, block: nn.Module, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool,
        sequences: Sequences | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if in_place and self._token is not None:
            found = self._token.block(block, x, memory, mass, position) if sequences is None else None
            return block(x, memory, mass, position, True, sequences) if found is None else (found, memory, mass)
        by_kernel = in_place and bool(self._kernels) and sequences is None
        if by_kernel and heads_block.serves(block, memory, mass) and not is_hooked(block):
            return self._compiled_token(block, x, memory, mass, position, self._kernels), memory, mass
        return self._by_graph(block, x, memory, mass, position, in_place, sequences)

    def _by_graph(self, module: nn.Module, *inputs: Any) -> Any:
        # A caller who compiles the whole model inlines the module.
        if torch.compiler.is_compiling() or is_hooked(module):
            return module(*inputs)
        return self._compiled(module, *inputs)


def _call(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def _kept(*, logits_to_keep: int | None = None, **others: Any) -> int | None:
    """Return ``logits_to_keep``, 0 for all, or None if it is negative or ``forward`` has other options."""
    kept = logits_to_keep or 0
    return kept if kept >= 0 and all(x is None for x in others.values()) else None


def _takes_all(forward: Callable[..., Any]) -> bool:
    """Return whether a class's ``forward`` takes all that ``RamNetForCausalLM.forward`` does."""
    try:
        inspect.signature(forward).bind(
            None, None, None, in_place=False, attention_mask=None, cu_seqlens=None, logits_to_keep=None, labels=None
        )
    except TypeError:
        return False
    return True


def _own(function: Any) -> Any:
    """Return a copy of the function with its own code object, to which torch.compile attaches graphs and limits."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _again(model: RamNetForCausalLM, target: str | None, tuned: bool, backend: str) -> RamNetForCausalLM:
    return compile(model, target, tuned=tuned, backend=backend)


def _target(model: RamNetForCausalLM, name: str | None) -> targets.Target:
    """Return the target called ``name``, or that of the model's device if None.

    Raises ValueError if the target's kernels cannot run on the model's device.
    """
    device = model.embedding.weight.device
    if name is None:
        return (targets.here() if device.type == "cuda" else None) or targets.find("cpu")
    found = targets.find(name)
    needed = "cpu" if found.gpu is None else "cuda"
    # Triton's interpreter takes tensors on any device. If there is no GPU at all, the backend raises the error.
    reached = device.type == needed or (needed == "cuda" and (interpreted() or not torch.cuda.is_available()))
    if not reached:
        raise ValueError(f"the model is on {device} but target {name!r} runs on {needed}: move it there first")
    return found
