"""``ramnet tune --target a100`` on a machine without that GPU."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from autotune.model.prediction import Predictor
from autotune.study.worker import Worker
from lowering import targets
from ramnet.config import RamNetConfig
from schedules import records
from tests.autotune.conftest import Command

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'ramnet[gpu]'")

NOT_RUN = "modelled, not run"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a small model's configuration."""
    config = RamNetConfig(
        vocab_size=8, hidden_size=64, num_layers=1, num_heads=2, value_dim=32, order=2, sub_dim=4, top_k=4
    )
    config.save(tmp_path / "model" / "config.json")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _one_worker(monkeypatch: pytest.MonkeyPatch, compiler: Worker) -> None:
    """The command's own makes the same."""

    def same(threads: int, build_limit: float, run_limit: float, makes: type) -> AbstractContextManager[Worker]:
        assert makes is Predictor
        return nullcontext(compiler)

    monkeypatch.setattr("autotune.study.worker.Worker", same)


@pytest.mark.parametrize("options", [("--target", "rtx4090"), ("--target", "h200", "--model")])
def test_each_output_says_that_nothing_was_run(
    ramnet: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(targets, "here", lambda: targets.find("h200"))
    target = options[1]
    status, out, err = ramnet(*options, "--checkpoint", model, "--trials", "1", "--op", "memory_step")
    assert (status, err.strip()) == (0, f"{target}: its kernels are compiled, and their times modelled, not run")
    assert NOT_RUN in out
    (row,) = (tmp_path / "records.jsonl").read_text().splitlines()
    assert json.loads(row)["how"] == NOT_RUN
    (record,) = records.load(tmp_path / "records.jsonl")
    assert (record.device, record.eager) == (target, None)
    assert record.workload.shape["N"] == 64 * 2, "64 sequences are decoded at a time"
    assert NOT_RUN in (tmp_path / "runs" / target / "report.html").read_text()


def test_the_batch_size_is_that_of_training_and_of_decoding(ramnet: Command, model: Path, tmp_path: Path) -> None:
    status, *_ = ramnet("--target", "a100", "--checkpoint", model, "--trials", "1", "--op", "memory_step",
                        "--op", "memory_scan", "--batch-size", "2", "--length", "8")  # fmt: skip
    assert status == 0
    step, scan = (
        next(r for r in records.load(tmp_path / "records.jsonl") if r.workload.op == op)
        for op in ("memory_step", "memory_scan")
    )
    assert step.workload.shape["N"] == scan.workload.shape["N"] == 4
    assert scan.workload.shape["T"] == 8


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--target", "cpu", "--model"), "ramnet: --model is for GPUs; the processor is here and is measured"),
        (("--target", "a100", "--batch-size", "0"), "ramnet: batch_size is 0; it must be at least 1"),
    ],
)
def test_bad_options_are_one_line(ramnet: Command, options: tuple[str, ...], line: str) -> None:
    status, out, err = ramnet(*options)
    assert (status, out, err.strip()) == (1, "", line)


def test_an_op_without_a_workload_on_the_target_is_named(ramnet: Command) -> None:
    status, _, err = ramnet("--target", "cpu", "--op", "decode_heads")
    assert status == 2
    assert "decode_heads has no workload on cpu" in err


def test_without_triton_it_says_what_to_install(
    ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out, err = ramnet("--target", "a100")
    assert (status, out, len(err.strip().splitlines())) == (1, "", 1)
    assert "pip install 'ramnet[gpu]'" in err
    assert not list(tmp_path.iterdir())
