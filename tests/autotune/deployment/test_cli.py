"""What ``ramnet tune-model`` refuses before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from autotune.deployment.cli import tune_model
from ramnet.files import locked_alone


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
