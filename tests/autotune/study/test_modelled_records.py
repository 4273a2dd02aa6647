"""Modelled records: which are kept, which are chosen, and what they contain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune import report
from schedules import records
from schedules.records import Time
from tests.autotune.study.predicting import DEFAULT, NOT_RUN, WORKLOAD, Synthetic, others, run

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")

SHIPPED = next(
    r for r in records.load(Path(records.__file__).parent / "records" / "a100.jsonl") if r.workload.op == "memory_scan"
)


@pytest.mark.parametrize("nvcc", ["nvcc", None])
def test_one_trial_does_not_replace_a_better_schedule_of_a_layers_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvcc: str | None
) -> None:
    """If its compiler is missing, so that it cannot be compared, the record stays, with a note."""
    monkeypatch.setattr("lowering.nvcc.nvcc", lambda: nvcc)
    path = tmp_path / "records.jsonl"
    best = SHIPPED.schedule()
    assert best.compiler == "tir" and best != type(best).default(SHIPPED.workload)  # type: ignore[attr-defined]
    worker = Synthetic(lambda schedule: 1.63e-3 if schedule == best else 2.51e-3)
    (result,) = run(tmp_path, worker, trials=1, workload=SHIPPED.workload)
    if nvcc is None:
        assert result.kept and not path.exists()
        assert "the known record stays" in report.notes([result])[0]
    else:
        (record,) = records.load(path)
        assert (record.schedule(), record.tuned.median, record.default.median) == (best, 1.63e-3, 2.51e-3)
        assert not result.kept


def test_the_known_best_stays_within_the_accuracy_of_the_model(tmp_path: Path) -> None:
    known, another = others()[:2]
    run(tmp_path, Synthetic(lambda schedule: 1e-5 if schedule == known else 2e-5))
    (tmp_path / "journal.log").unlink()
    (result,) = run(tmp_path, Synthetic(lambda s: 1e-5 if s == known else 0.99e-5 if s == another else 2e-5))
    assert result.record.schedule() == known
    (tmp_path / "journal.log").unlink()
    (result,) = run(tmp_path, Synthetic(lambda s: 1e-5 if s == known else 0.9e-5 if s == another else 2e-5))
    assert result.record.schedule() == another


def test_a_measured_row_is_not_replaced_and_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path))
    path = records.records_path("a100")
    (result,) = run(tmp_path, Synthetic(lambda schedule: 1e-5 if schedule == others()[0] else 2e-5))
    modelled = result.record
    records.merge(path, [modelled])
    assert records.choose(WORKLOAD, "a100", "a100").schedule == others()[0]
    time = Time(median=1e-5, spread=1e-6, runs=9)
    measured = modelled.model_copy(update={
        "how": "measured", "device": "NVIDIA A100-SXM4-80GB", "knobs": DEFAULT.model_dump(), "tuned": time,
        "default": time, "eager": time, "launches": (),
    })  # fmt: skip
    records.merge(path, [measured])
    assert records.load(path) == [measured]
    records.merge(path, [modelled])
    assert records.load(path) == [measured]
    assert records.choose(WORKLOAD, "a100", "a100").schedule == DEFAULT


def test_an_equally_near_measured_record_comes_before_a_modelled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path))
    (result,) = run(tmp_path, Synthetic(lambda schedule: 1e-5 if schedule == others()[0] else 2e-5))
    half, double = (WORKLOAD.model_copy(update={"shape": {**WORKLOAD.shape, "M": m}}) for m in (32, 128))
    modelled = result.record.model_copy(update={"workload": half})
    measured = result.record.model_copy(
        update={"workload": double, "how": "measured", "device": "z", "knobs": DEFAULT.model_dump()}
    )
    records.merge(records.records_path("a100"), [modelled, measured])
    assert records.choose(WORKLOAD, "a100", "a100").schedule == DEFAULT


def test_a_modelled_row_says_so_and_has_no_time_of_eager(tmp_path: Path) -> None:
    run(tmp_path, Synthetic(lambda schedule: 1e-5))
    row = json.loads((tmp_path / "records.jsonl").read_text())
    assert row["how"] == NOT_RUN
    assert "eager" not in row
    assert row["launches"] == [{"name": "kernel", "registers": 40, "spilled": 0, "local": 0, "shared": 0}]


# As the first version wrote it: no launches, and always a time of eager PyTorch.
OLD_ROW = (
    '{"workload":{"op":"memory_step","shape":{"N":16,"K":8,"M":1024,"D":64},"dtype":"float32","constants":'
    '{"decay_power":1.0,"eps":1e-6}},"target":"cpu","device":"a processor","knobs":{"tile":32,"unroll":8,'
    '"parallel":false,"prefetch":0},"how":"measured","gain":1.0,"gain_spread":0.0,"tuned":{"median":1e-05,"spread":1e-07,'
    '"runs":31},"default":{"median":1e-05,"spread":1e-07,"runs":31},"eager":{"median":1e-04,"spread":1e-06,"runs":31},'
    '"trials":96,"fingerprint":"0123456789abcdef","versions":{"apache-tvm":"0.27.0"},"date":"2026-01-01"}'
)


def test_rows_written_before_there_were_modelled_ones_are_read_and_written_alike(tmp_path: Path) -> None:
    path = tmp_path / "cpu.jsonl"
    path.write_text(OLD_ROW + "\n")
    (record,) = records.load(path)
    assert record.eager is not None and record.eager.median == 1e-4
    assert record.launches == ()
    records.merge(path, [])
    assert json.loads(path.read_text()) == json.loads(OLD_ROW)
