"""Journals that are damaged, foreign or not files are refused in one sentence and not changed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotune.study.journal import open_journal
from tests.autotune.study.test_study import VALID, search, study

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")

Line = dict[str, Any]
CREATE_STUDY, CREATE_TRIAL, SET_PARAM, SET_STATE, SET_ATTRIBUTE = 0, 4, 5, 6, 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of a search of three trials, one of which was planned."""
    folder = tmp_path_factory.mktemp("whole")
    search(study(folder), most=3)
    return (folder / "journal.log").read_bytes()


def refused(folder: Path, content: bytes) -> str:
    """Return why a journal is refused, and check that it is not changed."""
    journal = folder / "journal.log"
    journal.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        study(folder)
    assert journal.read_bytes() == content
    assert [path.name for path in folder.iterdir()] == ["journal.log"]
    said = str(caught.value)
    assert said.startswith(str(journal)) and "\n" not in said
    return said.removeprefix(str(journal))


def changed(whole: bytes, op_code: int, change: Callable[[Line], object], which: int = -1) -> tuple[bytes, int]:
    """The journal with one of the lines of an operation changed, and the line's number."""
    lines = [json.loads(line) for line in whole.splitlines()]
    number = [i for i, line in enumerate(lines) if line["op_code"] == op_code][which]
    change(lines[number])
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines), number + 1


@pytest.mark.parametrize(
    "content", [b"hello\n", b"hello", b"\n", b"\x80\x81\n", b"\xff\xfe{\x00\n\x00", b"[" * 100_000 + b"\n"]
)
def test_a_line_that_is_not_json_is_named(tmp_path: Path, whole: bytes, content: bytes) -> None:
    assert (
        refused(tmp_path, content) == ", line 1, is not a line of an Optuna journal: it is not JSON; name another file"
    )
    lines = whole.count(b"\n")
    assert refused(tmp_path, whole + content).startswith(f", line {lines + 1}, is not a line")


@pytest.mark.parametrize(
    "content", [b"[1]", b"1", b'{"a":1}', b'{"op_code":"4"}', b'{"op_code":true}', b'{"op_code":11}']
)
def test_an_unknown_operation_is_named_by_its_line(tmp_path: Path, content: bytes) -> None:
    assert ", line 1, is not a line of an Optuna journal: op_code must be one of 0 to 10" in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("op_code", "field"),
    [(0, "worker_id"), (0, "study_name"), (0, "directions"), (4, "study_id"), (4, "datetime_start"), (5, "trial_id"),
     (5, "param_name"), (5, "param_value_internal"), (5, "distribution"), (6, "state"), (6, "values"),
     (8, "user_attr")],
)  # fmt: skip
def test_a_field_that_is_missing_or_of_another_type_is_named(
    tmp_path: Path, whole: bytes, op_code: int, field: str
) -> None:
    content, number = changed(whole, op_code, lambda line: line.pop(field))
    assert f", line {number}, is not a line of an Optuna journal: {field} is missing;" in refused(tmp_path, content)
    content, number = changed(whole, op_code, lambda line: line.update({field: True}))
    assert f", line {number}, is not a line of an Optuna journal: {field} is True; it must be" in refused(
        tmp_path, content
    )


@pytest.mark.parametrize(
    ("op_code", "field", "value"),
    [(4, "study_id", 1), (4, "study_id", -1), (6, "trial_id", 10**30), (8, "trial_id", 99)],
)
def test_studies_and_trials_that_do_not_exist_are_named(
    tmp_path: Path, whole: bytes, op_code: int, field: str, value: int
) -> None:
    """Optuna itself ignores such lines silently."""
    content, number = changed(whole, op_code, lambda line: line.update({field: value}))
    said = rf", line {number}, is not a line of an Optuna journal: {field} is {value}, and \d+ were begun before it;"
    assert re.match(said, refused(tmp_path, content))


@pytest.mark.parametrize(
    ("op_code", "change"),
    [
        (CREATE_STUDY, {"directions": [7]}),
        (CREATE_TRIAL, {"datetime_start": "yesterday"}),
        (CREATE_TRIAL, {"state": 77}),
        (SET_PARAM, {"param_value_internal": 1e400}),
        (SET_PARAM, {"param_value_internal": 99}),
        (SET_PARAM, {"distribution": "{}"}),
        (SET_PARAM, {"distribution": "[]"}),
        (SET_STATE, {"state": -1}),
        (SET_ATTRIBUTE, {"user_attr": {}}),
    ],
)  # fmt: skip
def test_a_line_that_optuna_cannot_apply_is_named(tmp_path: Path, whole: bytes, op_code: int, change: Line) -> None:
    content, number = changed(whole, op_code, lambda line: line.update(change))
    assert f", line {number}, is not a line of an Optuna journal: " in refused(tmp_path, content)


FLOAT = '{"name":"FloatDistribution","attributes":{"low":0.0,"high":1.0,"step":null,"log":false}}'
OTHER = '{"name":"CategoricalDistribution","attributes":{"choices":[3,5,7]}}'


@pytest.mark.parametrize(
    ("op_code", "which", "change", "why"),
    [
        (CREATE_STUDY, 0, {"directions": [1]}, "does not maximise the gain"),
        (CREATE_STUDY, 0, {"directions": [2, 2]}, "does not maximise the gain"),
        (
            CREATE_TRIAL,
            0,
            {"system_attrs": {"fixed_params": {"tile": 5}}},
            "the knobs {'tile': 5} are not knobs of this",
        ),
        (CREATE_TRIAL, 0, {"system_attrs": {"fixed_params": [8]}}, "the knobs [8] are not knobs of this search"),
        (SET_PARAM, 0, {"distribution": FLOAT}, "tile is not a knob of this search with the values FloatDistribution"),
        (SET_PARAM, 1, {"distribution": OTHER}, "groups is not a knob of this search with the values (3, 5, 7)"),
        (SET_PARAM, 2, {"param_name": "chunks"}, "chunks is not a knob of this search with the values"),
        (SET_ATTRIBUTE, 0, {"user_attr": {"owner": "me"}}, "owner = 'me'"),
        (SET_ATTRIBUTE, 0, {"user_attr": {"owner": {"host": "here", "pid": -1, "began": 1.0}}}, "owner.pid = -1"),
        (SET_ATTRIBUTE, 1, {"user_attr": {"status": 1}}, "status = 1"),
        (SET_ATTRIBUTE, 1, {"user_attr": {"seconds": -1.0}}, "seconds = -1.0"),
        (SET_ATTRIBUTE, 1, {"user_attr": {"seconds": 1e308}}, "seconds = 1e+308"),
        (SET_ATTRIBUTE, 1, {"user_attr": {"other": "ok"}}, "it has ended without a status"),
        (SET_STATE, -1, {"values": None}, "its value is None; it must be a number"),
        (SET_STATE, -1, {"values": [float("nan")]}, "its value is [nan]; it must be a number"),
        (SET_STATE, -1, {"values": ["1"], "state": 3}, "its value is ['1']; it must be a number"),
        (SET_STATE, -1, {"values": [1.0, 2.0]}, "its value is [1.0, 2.0]; it must be a number"),
    ],
)
def test_a_trial_from_which_a_search_cannot_continue_is_named(
    tmp_path: Path, whole: bytes, op_code: int, which: int, change: Line, why: str
) -> None:
    content, _ = changed(whole, op_code, lambda line: line.update(change), which)
    assert why in refused(tmp_path, content)


def test_a_measured_trial_without_all_its_knobs_is_named(tmp_path: Path, whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    del lines[next(i for i, line in enumerate(lines) if b'"op_code":5' in line)]
    assert "trial 0 of 'memory_scan N=1" in (said := refused(tmp_path, b"".join(lines)))
    assert "is damaged: some of its knobs are missing; name another file" in said


def test_a_trial_killed_before_it_had_its_knobs_is_ignored(tmp_path: Path, whole: bytes) -> None:
    content, _ = changed(whole, SET_ATTRIBUTE, lambda line: line["user_attr"]["owner"].update(pid=2**31 - 1), which=-3)
    lines = content.splitlines(keepends=True)
    cut = max(i for i, line in enumerate(lines) if b'"param_name":"tile"' in line) + 1
    (tmp_path / "journal.log").write_bytes(b"".join(lines[:cut]))
    search(study(tmp_path))
    found = study(tmp_path)
    assert found.summary().statuses["killed"] == 1
    assert len(found.finished()) == len(VALID)


def test_studies_and_trials_count_as_optuna_counts_them(tmp_path: Path, whole: bytes) -> None:
    """A second study of the same name is not counted, and neither is a trial of a deleted study."""
    first, *_, last = whole.splitlines(keepends=True)
    trial = b'{"op_code":4,"worker_id":"x","study_id":%d,"datetime_start":null}\n'
    assert "study_id is 1, and 1 were begun before it" in refused(tmp_path, first + first + trial % 1)
    deleted = first + b'{"op_code":1,"worker_id":"x","study_id":0}\n' + trial % 0
    assert "and 0 were begun before it" in refused(tmp_path, deleted + last)


def test_a_deleted_study_and_one_of_its_name_after_it_are_a_journal(tmp_path: Path) -> None:
    import optuna

    search(study(tmp_path), most=2)
    found = study(tmp_path)
    optuna.delete_study(study_name=found.name, storage=found.storage)
    assert len(search(study(tmp_path), most=3)) == 3
    assert len(study(tmp_path).finished()) == 3


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link"])
def test_something_other_than_a_file_is_refused_and_not_read(tmp_path: Path, kind: str) -> None:
    journal = tmp_path / "journal.log"
    match kind:
        case "folder":
            journal.mkdir()
        case "pipe":
            os.mkfifo(journal)
        case "device":
            journal.symlink_to("/dev/zero")
        case "link":
            journal.symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(journal))} is .*; it must be a file$"):
        open_journal(journal)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.log"]


def test_an_empty_file_is_begun(tmp_path: Path) -> None:
    (tmp_path / "journal.log").touch()
    assert len(search(study(tmp_path))) == len(VALID)
