"""``ramnet.trace``: runs a model and records its accesses to the memory."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ramnet.ids import check_prompt
from ramnet.layer import RamLayer
from ramnet.model import RamNetForCausalLM
from ramnet.ops import Accesses
from ramnet.state import RamState
from ramnet.tracing.data import LayerTrace, Trace


@torch.no_grad()
def trace(
    model: RamNetForCausalLM,
    input_ids: Tensor,
    state: RamState | None = None,
    *,
    attention_mask: Tensor | None = None,
) -> Trace:
    """Read ``input_ids`` with ``model`` and return which slots each head wrote and read, and with which weights.

    The accesses are the arguments of the model's own calls of ``memory_scan``, on the kernels that it runs on. What
    ``lowering.compile`` returned is run on its kernels, but without torch.compile.

    Args:
        input_ids: int64 [B, T], B and T ≥ 1.
        state: the state after the tokens before ``input_ids``; None starts from a fresh one. It is not modified.
        attention_mask: bool or integer [B, T], True or 1 for a token and False or 0 for padding.

    Raises:
        ValueError: if ids are not [B, T] with B and T ≥ 1 or outside the vocabulary, the state or the mask does not
            fit (``RamNetForCausalLM.forward``), or ``model`` has no RAM-Net layer.
        TypeError: if a dtype is wrong, or ``model`` is of another class.
    """
    if not hasattr(model, "hidden_states"):
        raise TypeError(f"model is a {type(model).__name__}; it must be a RamNetForCausalLM")
    check_prompt(input_ids, model.config.vocab_size, "trace")
    mixers = [module for module in model.modules() if isinstance(module, RamLayer)]
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no RAM-Net layer, so there is no memory to trace")
    recorder, cape_heads = _Recorder(), list[int]()  # of each call: a layer may be called twice, or out of turn
    thread = threading.get_ident()

    def called(mixer: RamLayer, _: Any) -> None:
        if threading.get_ident() == thread:  # others may run the model, too
            cape_heads.append(mixer.cape_heads)

    hooks = [mixer.register_forward_pre_hook(called) for mixer in mixers]
    try:
        # A graph of torch.compile would call the ops unseen.
        with torch.compiler.set_stance("force_eager"), recorder:
            _, after = model.hidden_states(input_ids, state, attention_mask=attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = real.to("cpu", torch.bool)
    position = (real.cumsum(1) - 1).clamp(min=0)
    layers = [
        LayerTrace(accesses, mass, position, decay_power, eps, heads)
        for (accesses, mass, decay_power, eps), heads in zip(recorder.calls, cape_heads, strict=True)
    ]
    return Trace(input_ids.to("cpu", torch.int64), real, layers, after)


class _Recorder(TorchDispatchMode):
    """Copies the accesses, the initial mass, γ and ε of each call of ``memory_scan`` to the CPU, and runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Accesses[Tensor], Tensor, float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "ramnet::memory_scan":
            given = {argument.name: argument.default_value for argument in func._schema.arguments}
            given |= dict(zip(given, args, strict=False)) | (kwargs or {})
            accesses = Accesses(*(_copied(given[name]) for name in Accesses._fields))
            self.calls.append((accesses, _copied(given["mass"]), given["decay_power"], given["eps"]))
        return func(*args, **(kwargs or {}))


def _copied(x: Tensor) -> Tensor:
    """Copy to the CPU; a floating tensor to float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype
    return x.detach().to("cpu", dtype, copy=True)
