"""``ramnet.tune``: tuning from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ramnet
from autotune.study.search import Progress
from autotune.study.worker import Worker
from ramnet import RamNetConfig
from schedules import records

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
pytest.importorskip("tvm", reason="tuning for the CPU needs tvm: pip install 'ramnet[tvm]'")

CONFIG = RamNetConfig(
    vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, value_dim=4, order=2, sub_dim=2, top_k=2
)  # fmt: skip


def test_it_writes_records_and_returns_gains(tmp_path: Path) -> None:
    seen: list[Progress] = []
    (result,) = ramnet.tune(
        CONFIG, trials=1, threads=1, ops=["memory_step"], journal=str(tmp_path / "journal.log"),
        records_file=str(tmp_path / "records.jsonl"), on_progress=seen.append,
    )  # fmt: skip
    (record,) = records.load(tmp_path / "records.jsonl")
    assert record == result.record
    assert (record.workload.op, record.workload.shape["K"], record.gain) == ("memory_step", 2, 1.0)
    assert {progress.workload.op for progress in seen} == {"memory_step"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "abacus"}, "target 'abacus' is unknown; there are a10"),
        ({"budget": 0}, "budget is 0; it must be above 0"),
        ({"threads": 0}, "threads is 0; it must be from 1 to 1024, or None for all cores"),
        ({"ops": ["attention"]}, "op 'attention' is unknown; there are address_decode"),
        ({"ops": ["decode_heads"]}, "decode_heads has no workload on cpu; leave ops out"),
        ({"lengths": [0]}, "length is 0; it must be at least 1"),
        ({"sampler": "tpr"}, "sampler is 'tpr'; it must be 'tpe' or 'random'"),
        ({"build_limit": 0}, "build_limit is 0; it must be above 0"),
    ],
)
def test_invalid_arguments_are_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def never(self: Worker) -> None:
        raise AssertionError("a process was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Worker, "start", never)
    with pytest.raises(ValueError, match=message):
        ramnet.tune(CONFIG, **options)
    assert not list(tmp_path.iterdir())
