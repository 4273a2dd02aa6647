"""The search for a deployment keeps every trial, heeds the largest loss, and records what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="the library needs tvm: pip install 'ramnet[tvm]'")
pytest.importorskip("optuna", reason="the tuner needs optuna: pip install 'ramnet[tune]'")

from autotune.deployment import judge
from autotune.deployment.report import table
from autotune.deployment.search import MOST_LOSS, Search
from autotune.deployment.space import CSpace, OnnxSpace
from autotune.deployment.stored import Stored
from autotune.deployment.trial import Answer, Request
from autotune.study.worker import FailedError
from schedules.deployment import (
    AnyDeployment,
    OnnxDeployment,
    Point,
    find,
    load,
    merge,
)
from tests.autotune.deployment.machine import LOSSES, Machine, answer, seconds
from tests.lowering.aot.c_library import TINY


def test_defaults_are_tried_first_int8_and_then_from_the_fewest_bytes_on_and_a_later_run_goes_on(
    made: Callable[..., Search],
) -> None:
    first = made(budget=150.0)
    first.run()
    points = first.tried_points()
    defaults = list(first.defaults().values())
    assert [each.precision for each in defaults] == ["int8", "int4", "bfloat16", "float32"]
    assert [point.deployment for point in points[: len(defaults)]] == defaults
    assert len({point.deployment for point in points}) == len(points) > len(defaults)
    second = made(budget=150.0)
    assert second.tried_points() == points and second.losses() == first.losses()
    second.run()
    assert second.tried_points()[: len(points)] == points
    assert len(second.tried_points()) > len(points)


SET_UP = 20.0


@pytest.mark.parametrize(("budget", "trials"), [(29.0, 1), (45.0, 1), (90.0, 1), (120.0, 2), (180.0, 6)])
def test_a_search_ends_within_its_budget_and_nothing_that_it_begins_is_cut_off(
    made: Callable[..., Search], machine: type[Machine], budget: float, trials: int
) -> None:
    found = made(budget=budget)
    machine.clock += SET_UP
    found.run()
    record = found.finish()
    assert record.chosen.loss <= MOST_LOSS
    assert len(found.tried_points()) >= trials
    assert machine.clock <= budget and not machine.cut
    assert (record.gain is None) == (budget < 45) and (record.prompt_seconds is None) == (budget < 90)


def test_a_trial_that_hangs_is_killed_in_time_for_the_comparisons(
    made: Callable[..., Search], machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hanging(request: Request) -> Answer:
        if request.base.precision == "int4":
            request.seconds = 1e9
        return answer(request)

    monkeypatch.setattr(machine, "answer", staticmethod(hanging))
    found = made(budget=180.0)
    found.run()
    record = found.finish()
    assert machine.cut == 1 and machine.clock <= 180
    assert record.gain is not None and record.prompt_seconds is not None


@pytest.mark.parametrize("set_up", [5.0, 100.0])
def test_a_budget_that_nothing_fits_into_is_a_sentence(
    made: Callable[..., Search], machine: type[Machine], set_up: float
) -> None:
    found = made(budget=10.0)
    machine.clock += set_up
    found.run()
    assert machine.clock == max(10.0, set_up)
    with pytest.raises(RuntimeError, match=r"at most 0\.5% was measured within the budget of 10 s"):
        found.finish()


def test_precisions_that_lose_too_much_or_cannot_be_faster_are_neither_searched_nor_written(
    made: Callable[..., Search],
) -> None:
    sizes = made().space.sizes
    # Reading the weights in bfloat16 takes longer than the default in int8, in int8 it does not.
    default = seconds(made().defaults()["precision=int8"])
    bandwidth = sizes["bfloat16"] / (1.1 * default)
    assert sizes["int8"] < bandwidth * default
    found = made(bandwidth)
    found.run()
    tried = [point.deployment.precision for point in found.tried_points()]
    assert tried.count("int4") == 1, "its loss is too large"
    assert set(tried) == {"int4", "int8"} and tried.count("int8") > 1
    assert {path.name for path in found.stored.folder.iterdir()} == {
        "precision=int4", "precision=int8", judge.FILENAME,
    }  # fmt: skip


def test_the_fastest_within_the_largest_loss_is_recorded(made: Callable[[], Search], tmp_path: Path) -> None:
    found = made()
    found.run()
    assert len(found.tried_points()) == 1 + sum(each.precision != "int4" for each in found.space.every()), (
        "a search without an end tries all"
    )
    record = found.finish()
    chosen = record.chosen.deployment
    assert (chosen.precision, chosen.rows, chosen.threads, chosen.tokens, chosen.block) == ("int8", 2, 2, 8, 128)
    assert record.prompt_seconds is not None
    assert record.chosen.loss == pytest.approx(LOSSES["int8"]) and record.chosen.loss <= MOST_LOSS
    assert record.gain == pytest.approx(20e-6 / seconds(chosen))
    assert all(b.seconds > a.seconds and b.loss < a.loss for a, b in zip(record.front, record.front[1:], strict=False))
    file = tmp_path / "records.jsonl"
    merge(file, record.model_copy(update={"gain": 1.0}), ())
    merge(file, record.model_copy(update={"device": "another"}), ())
    merge(file, record, [record.chosen.deployment])
    merge(file, record.model_copy(update={"chosen": in_onnx(record.chosen)}), ())
    assert find(TINY, record.device, "onnx", file) != find(TINY, record.device, "c", file)
    assert sorted(load(file), key=lambda each: each.device != "another")[1] == record
    assert find(TINY, record.device, "c", file) == record
    assert find(TINY, "unknown", "c", file) is None


def in_onnx(point: Point) -> Point:
    deployment = OnnxDeployment(precision="int8", kernels=False, threads=1, prompt_threads=1, spinning=True)
    return point.model_copy(update={"deployment": deployment})


@pytest.mark.parametrize("kernels", [True, False])
def test_the_fastest_way_to_run_an_onnx_export_is_recorded(made: Callable[..., Search], kernels: bool) -> None:
    found = made(of=OnnxSpace(TINY, 4, kernels))
    found.run()
    assert {point.deployment for point in found.tried_points()} == set(found.space.every())
    record = found.finish()
    chosen = OnnxDeployment(precision="int8", kernels=kernels, threads=4, prompt_threads=4, spinning=False)
    assert record.chosen.deployment == chosen
    untuned = OnnxDeployment(precision="float32", kernels=False, threads=4, prompt_threads=4, spinning=True)
    assert record.gain == pytest.approx(seconds(untuned) / seconds(chosen)) and record.gain_over == "the untuned export"


def test_an_onnx_export_is_compared_with_the_untuned_one_even_if_that_was_not_worth_a_trial(
    made: Callable[..., Search],
) -> None:
    space = OnnxSpace(TINY, 2, kernels=True)
    found = made(bandwidth=space.sizes["float32"] / 1e-5, of=space)
    found.run()
    assert {point.deployment.precision for point in found.tried_points()} == {"int8"}
    assert found.finish().gain is not None


def test_each_onnx_deployment_is_tried_once_and_one_thread_does_not_wait() -> None:
    every = OnnxSpace(TINY, 3, kernels=True).every()
    assert len(set(every)) == len(every) == 2 * 2 * (2 * 3 - 1)
    assert all(each.spinning for each in every if isinstance(each, OnnxDeployment) and each.threads == 1)


def test_a_later_run_of_another_process_writes_what_its_comparisons_read(made: Callable[..., Search]) -> None:
    first = made()
    first.run()
    later = made()  # with a folder of its own
    later.run()
    chosen = later.finish().chosen.deployment
    assert (later.stored.folder / chosen.group).exists()


def test_the_report_marks_the_chosen_point_even_if_it_was_slower_the_second_time(made: Callable[[], Search]) -> None:
    found = made(budget=150.0)
    found.run()
    record = found.finish()
    slower = record.chosen.model_copy(update={"seconds": 1.0})
    assert slower not in record.front
    shown = table(record.model_copy(update={"chosen": slower}), 1e9)
    assert list(shown.columns[0].cells)[-1] == "→"
    assert list(shown.columns[0].cells).count("→") == 1


def test_a_failure_is_not_repeated_but_a_killed_trial_is(
    made: Callable[[], Search], machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AnyDeployment] = []
    kills = iter([True])

    def failing(request: Request) -> Answer:
        deployment = request.others.get("it", request.base)
        asked.append(deployment)
        if deployment.precision == "int8":
            raise FailedError("run_error", "the logits are off by 1.0e+00; the tolerance is 1e-01")
        if deployment.precision == "bfloat16" and next(kills, False):
            raise KeyboardInterrupt  # as if the process was killed
        return answer(request)

    monkeypatch.setattr(machine, "answer", staticmethod(failing))
    with pytest.raises(KeyboardInterrupt):
        made().run()
    again = made()
    default = again.defaults()["precision=bfloat16"]
    assert default not in again.tried()
    again.run()
    assert asked.count(default) == 2
    failed = [each for each, trial in again.tried().items() if "error" in trial.user_attrs]
    assert failed == [again.defaults()["precision=int8"]], "a precision whose default fails is left"
    assert asked.count(failed[0]) == 1


def test_files_that_cannot_be_made_are_a_failed_trial(
    made: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Stored.write

    def failing(self: Stored, deployment: AnyDeployment) -> None:
        if isinstance(deployment, OnnxDeployment) and deployment.kernels:
            raise RuntimeError("there is no C compiler")
        write(self, deployment)

    monkeypatch.setattr(Stored, "write", failing)
    found = made(of=OnnxSpace(TINY, 2, kernels=True))
    found.run()
    failed = [trial.user_attrs["error"] for trial in found.tried().values() if "error" in trial.user_attrs]
    assert failed == 2 * ["there is no C compiler"], "once for each precision"
    assert found.finish().chosen.deployment.group == "precision=int8 kernels=False"


def test_nothing_measured_is_a_sentence(
    made: Callable[[], Search], machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(request: Request) -> Answer:
        raise FailedError("run_error", "there is no C compiler")

    monkeypatch.setattr(machine, "answer", staticmethod(failing))
    found = made()
    found.run()
    with pytest.raises(RuntimeError, match="no deployment could be measured; there is no C compiler"):
        found.finish()


@pytest.mark.parametrize(
    ("attribute", "value", "why"),
    [
        ("point", "{}", "deployment is missing"), ("point", "{", "Invalid JSON"), ("point", 7, "JSON"),
        ("error", 7, "error is 7; it must be a text"),
    ],
)  # fmt: skip
def test_a_damaged_trial_is_named(
    made: Callable[[], Search], tmp_path: Path, attribute: str, value: object, why: str
) -> None:
    before = made()
    before.run()
    trial = before.study.get_trials()[0]
    lines = (tmp_path / "journal.log").read_text().splitlines(keepends=True)
    which = next(i for i, line in enumerate(lines) if '"user_attr":{"point"' in line)
    line = json.loads(lines[which])
    line["user_attr"] = {attribute: value}
    lines[which] = json.dumps(line) + "\n"
    (tmp_path / "journal.log").write_text("".join(lines))
    said = rf"journal\.log: trial {trial.number} is damaged: .*{why}.*; choose another --output$"
    with pytest.raises(ValueError, match=said):
        made()


def test_a_model_that_the_c_library_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="top_k"):
        CSpace(TINY.model_copy(update={"order": 2, "sub_dim": 16, "top_k": 130}), 2)
