"""The recall experiment compares every model at its settings and reports each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ramnet.recall import plan, report
from ramnet.recall.cli import recall
from ramnet.recall.plan import SCALES, Scale, ablations, baseline, configurations, every_order, ram_net
from ramnet.training.model import state_size
from ramnet.training.mqar import Mix, Mqar
from ramnet.training.sweep import Outcome, Run
from tests.ramnet.training import sweeps
from tests.ramnet.training.sweeps import trained

__all__ = ["trained"]

SMALL = Scale(
    trained=((1, 8),), tested=((1, 8), (2, 16)), search_steps=2, steps=4, batch_size=2, seeds=(0, 1),
    memories=((4, 1), (4, 2)), key_dims=(),
)  # fmt: skip


def test_a_mix_draws_as_many_tokens_at_each_setting() -> None:
    mix = Mix((Mqar(1, 8), Mqar(2, 16), Mqar(4, 32)), (Mqar(1, 8),))
    generator = torch.Generator().manual_seed(0)
    shapes = {tuple(mix.batch(12, generator)[0].shape) for _ in range(50)}
    assert shapes == {(12, 8), (6, 16), (3, 32)}


def test_orders_divide_the_same_number_of_slots() -> None:
    assert every_order(64) == [(64, 1), (64, 2), (64, 3), (64, 6)] and every_order(2) == [(2, 1)]
    for slots, order in (*every_order(256), *every_order(512)):
        assert [layer.slots for layer in ram_net(slots, order).layers] == [16, slots]


def test_states_are_memories_masses_and_last_inputs() -> None:
    assert state_size(ram_net(64, 3), 1000) == 4 * (16 + 64) * (16 + 1)
    assert state_size(baseline("gla", 64), 1000) == 2 * 64 * 64 + 2 * 64
    assert state_size(baseline("attention", 64), 1000) == 2 * 2 * 64 * 1000 + 2 * 64


def test_every_scale_trains_and_tests_settings_that_exist() -> None:
    for scale in SCALES.values():
        assert [Mqar(*setting) for setting in (*scale.trained, *scale.tested)]
        assert len({name for name, _ in configurations(scale)}) == len(list(configurations(scale)))


def test_ablations_change_one_model_each_in_another_way(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = list(dict(ablations()).values())
    assert changed[0] == ram_net(64, 3) and len(set(changed)) == len(changed)
    few = dict(list(ablations())[:2])
    monkeypatch.setattr(plan, "ablations", lambda: few.items())
    monkeypatch.setitem(plan.SCALES, "ablations", replace(SMALL, ablations=True))
    done = CliRunner().invoke(recall, ["--scale", "ablations", "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = (tmp_path / report.TABLE).read_text().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(few)
    assert not list(tmp_path.glob("*.png"))


def test_the_command_writes_a_table_data_and_two_pictures(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib: pip install 'ramnet[tune]'")
    monkeypatch.setitem(plan.SCALES, "quick", SMALL)
    done = CliRunner().invoke(recall, ["--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = (tmp_path / report.TABLE).read_text().splitlines()
    assert rows[0] == "| model | state | 1 pairs, 8 | 2 pairs, 16 | mean | ± | rate | seeds |" and len(rows) == 2 + 3
    assert rows[2] == "| RAM-Net M=4 U=1 | 1360 | 0.900 | 0.500 | 0.700 | 0.000 | 0.01 | 2 |"
    facts = json.loads((tmp_path / report.DATA).read_text())
    assert [each["family"] for each in facts] == ["RAM-Net", "RAM-Net", "attention"]
    for picture in (report.BY_STATE, report.BY_ORDER):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_pictures_show_models_that_recall_everything_or_nothing(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib: pip install 'ramnet[tune]'")

    def ended(run: Run) -> Outcome:
        accuracy = 1.0 if run.name == "attention" else 0.0
        return of_run(run).model_copy(update={"scores": [accuracy] * len(of_run(run).scores)})

    of_run, drawn = sweeps.outcome_of, {}
    monkeypatch.setattr(sweeps, "outcome_of", ended)
    monkeypatch.setattr(report, "write_png", lambda path, figure: drawn.update({path.name: figure}))
    monkeypatch.setitem(plan.SCALES, "quick", SMALL)
    CliRunner().invoke(recall, ["--output", str(tmp_path)], catch_exceptions=False)
    for picture, expected in ((report.BY_STATE, {0.01, 0.999}), (report.BY_ORDER, {0.01})):
        (axes,) = drawn[picture].axes
        heights = {float(height) for line in axes.lines for height in line.get_ydata()}
        low, high = axes.get_ylim()
        assert heights == expected and all(low < height < high for height in heights)


def test_a_table_says_which_models_diverged_and_shows_no_spread_of_one_seed(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(run: Run) -> Outcome:
        found = of_run(run)
        gone = {"metric": None, "loss": None, "scores": []}
        lost = run.name == "attention" or (run.name.endswith("U=1") and run.recipe.seed == 1)
        return found.model_copy(update=gone if run.scored and lost else {"skipped": 3 * run.name.endswith("U=2")})

    of_run = sweeps.outcome_of
    monkeypatch.setattr(sweeps, "outcome_of", ended)
    monkeypatch.setitem(plan.SCALES, "quick", SMALL)
    done = CliRunner().invoke(recall, ["--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    table, *below = (tmp_path / report.TABLE).read_text().strip().split("\n\n")
    assert [row.split(" | ")[-4:] for row in table.splitlines()[2:]] == [
        ["0.700", "", "0.01", "1 |"], ["0.700", "0.000", "0.01", "2 |"],
    ]  # fmt: skip
    assert below == [
        "RAM-Net M=4 U=1 diverged with 1 of 2 seeds, which its means leave out.",
        "RAM-Net M=4 U=2 skipped 6 steps whose loss or gradient was not finite.",
        "attention diverged at every rate that was trained to the end.",
    ]


def test_pictures_are_drawn_if_every_order_diverged(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib: pip install 'ramnet[tune]'")
    gone = {"metric": None, "loss": None, "scores": []}
    of_run = sweeps.outcome_of
    monkeypatch.setattr(
        sweeps, "outcome_of", lambda run: of_run(run).model_copy(update={} if run.name == "attention" else gone)
    )
    monkeypatch.setitem(plan.SCALES, "quick", SMALL)
    done = CliRunner().invoke(recall, ["--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / report.BY_ORDER).read_bytes().startswith(b"\x89PNG")


def test_if_every_model_diverged_there_is_no_table(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"metric": None, "loss": None, "scores": []}
    of_run = sweeps.outcome_of
    monkeypatch.setattr(sweeps, "outcome_of", lambda run: of_run(run).model_copy(update=gone))
    monkeypatch.setitem(plan.SCALES, "quick", SMALL)
    done = CliRunner().invoke(recall, ["--output", str(tmp_path)])
    assert done.exit_code == 1 and "every model diverged at every rate" in done.output
    assert not (tmp_path / report.TABLE).exists()


@pytest.mark.parametrize("command", ["recall", "lm"])
def test_bad_input_is_found_before_anything_is_trained(
    command: str, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    assert command_line(command, "--kernels", "nope", "--output", output) == 1
    assert "'nope'" in capsys.readouterr().err
    assert not output.exists()
    (output / f"{command}.json").mkdir(parents=True)
    assert command_line(command, "--kernels", "reference", "--output", output) == 1
    assert f"{command}.json is a folder; it must be a file, or absent" in capsys.readouterr().err
