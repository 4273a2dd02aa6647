"""Records of deployments."""

from __future__ import annotations

from pathlib import Path

import pytest

from schedules.deployment import Deployment, Point, front, load


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
