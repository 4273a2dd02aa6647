"""CUDA graphs without a GPU: records the operators of a run and replays them on the same tensors.

As on a GPU, recording does not change tensors, a replay does not see Python variables, and operators that synchronise
with the device cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that pass a number or a size from the device to Python.
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique", "item", "_unique2", "masked_select")


class NoWaiting(TorchDispatchMode):
    """Raises RuntimeError for an operator that would synchronise if the CPU's tensors were on a GPU."""

    def __enter__(self) -> Any:
        self.on_cpu = [patch(f"ramnet.{name}.can_be_read", lambda tensor: False) for name in ("state", "state_checks")]
        for each in self.on_cpu:
            each.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for each in self.on_cpu:
            each.stop()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.__name__.split(".")[0] in WAITS:
            raise RuntimeError(f"{operator} waits for the device")
        return self.run(operator, args, kwargs or {})

    def run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        return operator(*args, **kwargs)


class _Recording(NoWaiting):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        for argument, value in zip(operator._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, _tensors(result)))
        return result

    def undo(self) -> None:
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def replay(self) -> None:
        for operator, args, kwargs, results in self.calls:
            for recorded, again in zip(results, _tensors(operator(*args, **kwargs)), strict=True):
                if recorded.data_ptr() != again.data_ptr():
                    recorded.copy_(again)


class Recorder:
    """A ``lowering.model.token_graphs.Record`` that counts how often it recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor], rehearse: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        rehearse()
        self.recorded += 1
        with _Recording() as recording:
            result = run()
        recording.undo()

        def replay() -> None:
            self.replayed += 1
            recording.replay()

        return replay, result.fill_(torch.nan)


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]
