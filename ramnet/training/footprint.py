"""What a training step needs: bytes and floating-point operations, found on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ramnet.baselines import BaselineConfig
from ramnet.loss import LOGITS_AT_ONCE, summed_cross_entropy
from ramnet.state import RamState
from ramnet.training.model import Model, make
from ramnet.training.objective import recomputed

PARTS = 8  # of the logits that are traced; a batch of a million tokens of 32 000 has two thousand


class Rows(NamedTuple):
    """What is computed at a time.

    Attributes:
        size: rows.
        length: tokens of a row.
        labels: tokens of a row that have a label.
        carried: whether a row goes on from a state.
    """

    size: int
    length: int
    labels: int
    carried: bool = False


class Pass(NamedTuple):
    """A forward and a backward pass.

    Attributes:
        activations: the most bytes that exist at a time, besides parameters and their gradients. Memory that kernels
            allocate for themselves while they run is not among them.
        flops: floating-point operations of matrix products, those of recomputation and of all heads included. The
            memory ops of RAM-Net are not counted.
    """

    activations: int
    flops: int


def one_pass(model: Model, rows: Rows, precision: torch.dtype, recompute: bool, device: torch.device) -> Pass:
    """Return what a forward and a backward pass of ``rows`` on ``device`` need, without computing anything.

    ``model`` may be on the meta device; the dtypes of its parameters count. Rows that hold several documents are taken
    as if each were one.
    """
    with FakeTensorMode(), torch.device(device):
        copy = make(model.config)
        for mine, given in zip(copy.parameters(), model.parameters(), strict=True):
            mine.data = mine.data.to(given.dtype)
            mine.grad = torch.zeros_like(mine)
        counted = _Counted(x for p in copy.parameters() for x in (p, p.grad) if x is not None)
        with recomputed(copy, recompute), counted:
            loss, left_out = _loss(copy, rows, precision)
            loss.backward()
    # A label's logits, once more in the backward pass, and their two gradients.
    head = 2 * copy.head.weight.numel() * 4
    return Pass(counted.most, counted.flops + left_out * head)


def _loss(model: Model, rows: Rows, precision: torch.dtype) -> tuple[Tensor, int]:
    """As ``Objective`` does, whose number of labels depends on their values, which there are none of.

    Also returns how many labels are left out, of more parts of the logits than ``PARTS``: each part is traced in turn,
    and needs what the others do.
    """
    ids = torch.zeros(rows.size, rows.length, dtype=torch.int64)
    labels, vocab_size = rows.size * rows.labels, model.config.vocab_size
    traced = min(labels, PARTS * max(1, LOGITS_AT_ONCE // vocab_size))
    at = torch.zeros(labels, dtype=torch.int64)
    with torch.autocast(ids.device.type, dtype=precision, enabled=precision != torch.float32):
        hidden, _ = model.hidden_states(ids)
        hidden = hidden.flatten(0, 1)[at]
        if traced < labels:
            hidden, at = hidden[:traced], at[:traced]
        return summed_cross_entropy(model.head, hidden, at, vocab_size), labels - traced


class _Counted(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that are created within the block, until they are freed.

    Args:
        there: tensors that were created before, of which the block may make views.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = self.most = self._now = 0
        self._known = weakref.WeakSet(x.untyped_storage() for x in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for x in _pytree.tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self._now -= size


class Held(NamedTuple):
    """Bytes that a process holds throughout a run."""

    parameters: int
    gradients: int
    optimizer: int  # the two moments of AdamW, and the steps of each parameter


def held(model: nn.Module, processes: int = 1) -> Held:
    """Return what a process holds that shares parameters with others; of FSDP2's, the first, whose share is the
    largest."""
    own = sum(-(-p.shape[0] // processes) * p[0].numel() * p.element_size() for p in model.parameters())
    return Held(own, own, 2 * own + 4 * sum(1 for _ in model.parameters()))


def gathered(model: Model) -> int:
    """Return the bytes of parameters and gradients that FSDP2 makes whole at a time: of a block, and of what is outside
    all blocks."""
    blocks = [parameter_bytes(block) for block in (*model.convs, *model.blocks)]
    return 2 * (parameter_bytes(model) - sum(blocks) + max(blocks, default=0))


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def state_bytes(model: Model, rows: Rows) -> int:
    """Return the bytes of the state that rows go on from; 0 if they do not."""
    if not rows.carried or isinstance(model.config, BaselineConfig):
        return 0
    state = RamState.zeros(model.config, rows.size, device="meta")
    return sum(x.numel() * x.element_size() for x in state.tensors().values())


def checkpoint_bytes(model: Model, rows: Rows) -> tuple[int, int]:
    """Return the bytes of tensors in ``model.safetensors`` and in ``training.safetensors``."""
    weights = parameter_bytes(model)
    places = 16 * rows.size if rows.carried else 0  # in the text
    generator = torch.Generator().get_state().numel()
    return weights, weights + held(model).optimizer + state_bytes(model, rows) + places + generator
