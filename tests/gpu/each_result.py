"""A plugin of pytest that writes each test's result as soon as it is known: a line of JSON in RAMNET_VISIT_TESTS."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# Characters of a failure's text, from its end.
MOST_TEXT = 1500


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Under xdist, the process that distributes the tests also gets each report."""
    path = os.environ.get("RAMNET_VISIT_TESTS")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    text = report.longreprtext[-MOST_TEXT:] if report.failed else ""
    found = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "text": text}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
