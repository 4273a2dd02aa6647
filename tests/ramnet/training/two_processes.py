"""What test_parallel.py runs in two processes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from ramnet.training import Recipe, train
from ramnet.training.model import Model, make
from ramnet.training.objective import Execution, Objective
from ramnet.training.parallel import Kind, Parallel, processes
from ramnet.training.text import Text
from tests.ramnet.training.test_rows import SMALL

RECIPE = Recipe(steps=4, batch_size=4, warmup_steps=1, weight_decay=0.1, seed=3)
SHORT = RECIPE.model_copy(update={"steps": 2})
EXECUTION = Execution(micro_batch=1, recompute=True)


def fresh() -> Model:
    torch.manual_seed(0)
    return make(SMALL)


def text(folder: Path) -> Text:
    return Text(sorted((folder / "data").iterdir()), 6, "carried")


class NotFinite(Text):
    """The text, the second batch of which gives rank 1 a loss of NaN."""

    model: Model
    rank = 0
    batches = 0

    def batch(self, size: int, generator: torch.Generator) -> Any:
        self.batches += 1
        with torch.no_grad():
            scale = math.nan if self.batches == 2 and self.rank == 1 else 1.0
            # The hook is of this process alone.
            self.model.norm.register_forward_hook(lambda _m, _x, out, scale=scale: out * scale)
        return super().batch(size, generator)


def run(kind: Kind, folder: Path, name: str, resume: bool, parallel: Parallel) -> tuple[list[float], float]:
    """Train in ``folder``/``name``, with a carried state, from its checkpoint if ``resume``."""
    recipe = RECIPE if resume else SHORT
    found = train(
        fresh(), text(folder), recipe, output=folder / name, resume=resume, execution=EXECUTION, parallel=parallel
    )
    return found.losses, found.metric


def work(rank: int, folder: Path, port: int) -> None:
    """Be process ``rank`` of two; rank 0 leaves what it found in the file "found"."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with processes("ddp") as ddp:
        fsdp = Parallel(ddp.rank, ddp.count, "fsdp")
        found["ddp"] = run("ddp", folder, "ddp", False, ddp)
        found["fsdp"] = run("fsdp", folder, "fsdp", False, fsdp)
        # One process began this run.
        found["resumed"] = run("fsdp", folder, "one", True, fsdp)
        model, task = fresh(), NotFinite(sorted((folder / "data").iterdir()), 6)
        task.model, task.rank = model, rank
        result = train(model, task, SHORT, parallel=ddp)
        fsdp.wrap(Objective(sharded := fresh(), "float32", False))
        found["share"] = sum(x.to_local().nbytes for x in sharded.parameters())  # type: ignore[operator]
        found["skipped", rank] = (result.skipped, [x.tolist() for x in model.parameters()][:2])
    torch.save(found, folder / f"found{rank}")
