"""Records of deployments."""

from __future__ import annotations

from pathlib import Path

import pytest

from schedules.deployment import Deployment, DeploymentRecord, Point, front, load, merge


def test_points_that_another_beats_in_both_are_not_in_the_front() -> None:
    def point(seconds: float, loss: float) -> Point:
        deployment = Deployment(precision="int8", rows=1, lanes=16, tokens=4, threads=1, spins=0)
        return Point(deployment=deployment, seconds=seconds, loss=loss, size=1)

    points = [point(2.0, 0.1), point(1.0, 0.2), point(2.0, 0.3), point(3.0, 0.1), point(3.0, 0.0)]
    assert [(each.seconds, each.loss) for each in front(points)] == [(1.0, 0.2), (2.0, 0.1), (3.0, 0.0)]


def test_a_damaged_record_file_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"records.jsonl, line 1, is not a record"):
        load(tmp_path / "records.jsonl")


def test_a_record_is_replaced_by_one_that_was_compared_with_it_is_faster_or_of_other_code(tmp_path: Path) -> None:
    def record(rows: int, seconds: float, **others: object) -> DeploymentRecord:
        deployment = Deployment(precision="int8", rows=rows, lanes=16, tokens=4, threads=1, spins=0)
        point = Point(deployment=deployment, seconds=seconds, loss=0.0, size=1)
        common = {"model": "m", "device": "d", "gain": None, "gain_spread": None, "judged_by": "text", "most_loss": 0.1,
                  "front": [point], "trials": 1, "fingerprint": "code", "date": "2026-11-28"}  # fmt: skip
        return DeploymentRecord(chosen=point, **(common | others))

    file, known, slower = tmp_path / "records.jsonl", record(1, 1e-5), record(2, 9e-5)
    assert merge(file, known, ())
    assert not merge(file, slower, [slower.chosen.deployment]) and load(file) == [known]
    # The knobs of prompts, which are chosen last, do not matter.
    tried = known.chosen.deployment.model_copy(update={"block": 64, "tokens": 8})
    assert merge(file, slower, [tried]) and load(file) == [slower]
    assert merge(file, known, ()) and load(file) == [known]
    other = record(2, 9e-5, fingerprint="other")
    assert merge(file, other, ()) and load(file) == [other]
    link = tmp_path / "link.jsonl"
    link.symlink_to(file.name)
    assert merge(link, known, ()) and link.is_symlink() and load(file) == [known]
