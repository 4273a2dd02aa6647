"""Searches whose trials are answered by a machine of known times."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from autotune.deployment.search import Search
    from autotune.deployment.space import Space
    from schedules.deployment import AnyDeployment
    from tests.autotune.deployment.machine import Machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    """Trials are answered by ``Machine``, in a small space, on its clock."""
    from autotune.deployment import cli, costs, judge, search, space
    from autotune.deployment.stored import Stored
    from tests.autotune.deployment.machine import WRITING, Machine, answer

    for module in (cli, search, costs):
        monkeypatch.setattr(module, "perf_counter", lambda: Machine.clock)

    def write(self: Stored, deployment: AnyDeployment) -> None:
        if not (self.folder / deployment.group).exists():
            Machine.clock += WRITING
            (self.folder / deployment.group).mkdir()

    monkeypatch.setattr(judge, "save", lambda path, model, text: path.touch())
    monkeypatch.setattr(Stored, "write", write)
    monkeypatch.setattr(Machine, "clock", 0.0)
    monkeypatch.setattr(Machine, "cut", 0)
    monkeypatch.setattr(search, "Process", Machine)
    monkeypatch.setattr(Machine, "answer", staticmethod(answer))
    monkeypatch.setattr(space, "ROWS", (1, 2, 4))
    monkeypatch.setattr(space, "LANES", (16, 32))
    return Machine


@pytest.fixture
def made(tmp_path: Path, machine: type[Machine], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Search]:
    """Makes searches on one journal, which begin when they are made."""
    from autotune.deployment import costs, space
    from autotune.deployment.search import Search
    from autotune.deployment.space import CSpace
    from autotune.deployment.stored import Stored
    from tests.lowering.aot.c_library import TINY, model_of

    monkeypatch.setattr(space, "SPINS", (20000,))
    model, count = model_of(TINY), iter(range(100))

    def make(bandwidth: float = inf, budget: float = inf, of: Space | None = None) -> Search:
        folder = tmp_path / f"weights{next(count)}"
        folder.mkdir()
        stored = Stored(model, None, folder, of or CSpace(TINY, 2))
        return Search(
            stored, tmp_path / "journal.log", seed=0, bandwidth=bandwidth,
            budget=costs.Costs(budget, machine.clock), on_progress=lambda _: None,
        )  # fmt: skip

    return make
