"""A tuning run of one small workload on the processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotune.study.search import Budget, Result
from autotune.study.tuner import tune
from schedules.cpu import AddressDecodeBackward
from schedules.workload import Workload
from tests.autotune.faulty import WORKLOAD

DEFAULT = AddressDecodeBackward.default(WORKLOAD)
BEST = AddressDecodeBackward(lanes=8, parallel=False)


def run(
    folder: Path, worker: Any, trials: int | None = None, workloads: Sequence[Workload] = (WORKLOAD,), **options: Any
) -> list[Result]:
    places = {"journal": folder / "journal.log", "records_file": folder / "records.jsonl", "threads": 1} | options
    return tune("cpu", workloads, worker, budget=Budget(seconds=None, trials=trials), **places)
