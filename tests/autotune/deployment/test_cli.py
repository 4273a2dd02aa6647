"""``ramnet tune-model`` refuses what it cannot do before it begins, and writes a record and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("tvm", reason="the library needs tvm: pip install 'ramnet[tvm]'")
pytest.importorskip("optuna", reason="the tuner needs optuna: pip install 'ramnet[tune]'")

from autotune.deployment.cli import tune_model
from export.c.build import export_c
from ramnet.files import locked_alone
from schedules.deployment import DeploymentRecord
from tests.autotune.deployment.machine import Machine
from tests.lowering.aot.c_library import TINY, model_of


@pytest.mark.parametrize("budget", ["nan", "inf", "0", "-1"])
def test_a_budget_that_is_no_time_is_refused(tmp_path: Path, budget: str) -> None:
    done = CliRunner().invoke(tune_model, ["--preset", "tiny", "--output", str(tmp_path / "out"), "--budget", budget])
    assert done.exit_code == 2
    assert "Invalid value for '--budget'" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_another_process_searches_is_refused(tmp_path: Path) -> None:
    output, records = tmp_path / "out", tmp_path / "records.jsonl"
    with locked_alone(output / ".lock", "taken by the test itself"):
        done = CliRunner().invoke(
            tune_model, ["--preset", "tiny", "--output", str(output), "--records", str(records), "--budget", "1"]
        )
    assert str(done.exception) == f"{output} is in use: another process searches there; choose another --output"
    assert list(tmp_path.iterdir()) == []


def test_the_command_records_draws_and_the_export_takes_it(
    tmp_path: Path, machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr("autotune.measure.bandwidth.bandwidth", lambda level, threads: 1e12)
    checkpoint = tmp_path / "checkpoint"
    model_of(TINY).save_pretrained(checkpoint)
    options = [str(checkpoint), "--output", str(tmp_path / "out"), "--budget", "1000", "--threads", "1"]
    done = CliRunner().invoke(tune_model, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "the tokens/s of lowering.compile" in done.output
    assert (tmp_path / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    (line,) = (tmp_path / "records" / "deployments.jsonl").read_text().splitlines()
    record = DeploymentRecord.model_validate(json.loads(line))
    built: list[Any] = []
    monkeypatch.setattr("lowering.aot.build.write_libraries", lambda *arguments: built.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_c(model_of(TINY), tmp_path / "c", deployment=record.chosen.deployment)
    (arguments,) = built
    chosen = record.chosen.deployment
    assert arguments[1] == chosen.precision == "int8"
    assert (arguments[4].tiling.rows, arguments[4].tiling.tokens) == (chosen.rows, chosen.tokens)
    assert arguments[4].block == chosen.block == 128
