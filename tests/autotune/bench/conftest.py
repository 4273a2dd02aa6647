"""Fixtures for the tests of a GPU's benchmark, which is run tiny and on the CPU."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from autotune.bench.gpu import scan, training
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import DEFAULT, TUNED, Table
from autotune.measure.timing import interleaved
from ramnet import RamNetConfig, ops
from ramnet.ops import reference

TINY = scan.Sizes(batch=2, heads=2, tokens=9, top_k=3, order=2, sub_dim=3, dim=4)


class Kernels:
    """Stand-ins for the kernels, whose interpretation takes seconds per call: the reference, recording its calls.

    ``off`` is the relative error of the first element of the output of a scan and of a step.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.off = 0.0

    def __getattr__(self, op: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[op] += 1
            found = getattr(reference, op)(*arguments)
            if op in ("memory_scan", "memory_step"):
                (found if op == "memory_step" else found[0]).mul_(1 + self.off)
            return found

        return call


class Compiled(torch.nn.Module):
    """A model on the stand-ins, instead of ``lowering.compile``'s."""

    def __init__(self, model: Any, use: Any) -> None:
        super().__init__()
        self.model, self.use = model, use

    def forward(self, *arguments: Any, **named: Any) -> Any:
        with self.use():
            return self.model(*arguments, **named)


@pytest.fixture
def kernels() -> dict[str, Kernels]:
    """With default and with tuned schedules."""
    found = {name: Kernels() for name in (DEFAULT, TUNED)}
    for name, each in found.items():
        ops.register_backend(f"stand-in, {name}", each)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Kernels]) -> GpuRun:
    """On the CPU."""
    run = GpuRun("h200", quick=True, device="cpu")
    run.kernels = {name: partial(ops.using, f"stand-in, {name}") for name in kernels}
    monkeypatch.setattr("autotune.measure.timing.SHORTEST_SAMPLE", 1e-6)
    shortly = lambda calls, rounds, seconds, clock: interleaved(calls, 3, 0.0, clock=clock)  # noqa: E731
    monkeypatch.setattr("autotune.bench.run.interleaved", shortly)
    monkeypatch.setattr(scan, "FORMS", ())
    return run


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's functions, implemented by the recurrences in its documentation."""

    def recurrent_gla(q: Any, k: Any, v: Any, gk: Any, scale: Any = None, initial_state: Any = None,
                      output_final_state: bool = False) -> Any:  # fmt: skip
        state = torch.zeros(*k.shape[::2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
        out = []
        for t in range(q.shape[1]):
            state = gk[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            out.append((q[:, t, :, None].float() @ state.float())[:, :, 0])
        return torch.stack(out, 1).to(q.dtype) * q.shape[-1] ** -0.5, state

    def delta(q: Any, k: Any, v: Any, g: Any, beta: Any, initial_state: Any, output_final_state: bool,
              use_qk_l2norm_in_kernel: bool) -> Any:  # fmt: skip
        assert output_final_state and use_qk_l2norm_in_kernel and g.shape == beta.shape == q.shape[:3]
        return v, initial_state * g.exp()[:, 0, :, None, None]

    fla, package, gla, rule = (ModuleType(name) for name in ("fla", "fla.ops", "gla", "rule"))
    gla.chunk_gla = lambda q, k, v, g: recurrent_gla(q, k, v, g)  # type: ignore[attr-defined]
    gla.fused_recurrent_gla = recurrent_gla  # type: ignore[attr-defined]
    rule.fused_recurrent_gated_delta_rule = delta  # type: ignore[attr-defined]
    modules = {"fla": fla, "fla.ops": package, "fla.ops.gla": gla, "fla.ops.gated_delta_rule": rule}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def no_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.ops", "fla.ops.gla", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, run: GpuRun) -> None:
    """Models of the 340m model's sizes with one layer, on the stand-ins and without torch.compile."""
    config = RamNetConfig(
        vocab_size=11, hidden_size=32, num_layers=2, num_heads=2, value_dim=4, order=2, sub_dim=3, top_k=3,
        intermediate_size=8, cape_full_layers=1,
    )  # fmt: skip
    monkeypatch.setattr(RamNetConfig, "preset", lambda name: config)
    monkeypatch.setattr(training, "CHECKED_TOKENS", 5)
    monkeypatch.setattr(
        "lowering.compile", lambda model, target, tuned=True: Compiled(model, run.kernels[TUNED if tuned else DEFAULT])
    )
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)


def forms(table: Table) -> set[str]:
    return {row.form for row in table.rows}
