"""The groups of the benchmark on a CPU, and what runs in processes of its own."""

from __future__ import annotations

import os
import subprocess

import pytest

from autotune.bench.cpu import apart, decode_process, everything, language_model, onnx, ops, token
from autotune.bench.run import Run, Table
from tests.autotune.bench.tables import table


def test_a_group_that_fails_is_left_out_and_each_other_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Table:
        raise MemoryError("no room")

    for module, name in (
        (ops, "memory_scan_training"), (ops, "address_decode"), (ops, "memory_step"), (ops, "memory_step_slots"),
        (language_model, "training_step"), (language_model, "prefill"), (language_model, "decode"),
        (language_model, "decode_late"), (decode_process, "decode"), (token, "token"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, fails)
    monkeypatch.setattr(ops, "memory_scan", lambda run: table("memory_scan", "a", {"a": 1.0}))
    monkeypatch.setattr(onnx, "tables", lambda run, threads: [table("ONNX", "a", {"a": 1.0})])
    monkeypatch.setattr(everything, "_peak", lambda run: None)
    monkeypatch.setattr(everything, "_correlate", lambda run: run.notice("correlated"))
    told: list[tuple[int, int]] = []
    reports = list(everything.measure(Run("cpu", quick=True), 1, lambda done, of: told.append((done, of))))
    assert [[each.name for each in report.tables] for report in reports] == [
        ["memory_scan"], ["memory_scan", "ONNX"], ["memory_scan", "ONNX"]
    ]  # fmt: skip
    assert reports[-1].notices[-1] == "correlated" and "token 340m is left out: no room" in reports[-1].notices
    assert sum(notice.endswith("is left out: no room") for notice in reports[-1].notices) == 11
    assert told == [(done, 15) for done in range(16)]


def test_decoding_spins_whatever_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_THREAD_POOL_SPIN_COUNT", "0")
    given: dict[str, str] = {}

    def output_of(*_: str, timeout: float, environment: dict[str, str]) -> str:
        given.update(environment)
        raise RuntimeError("enough")

    monkeypatch.setattr(decode_process, "output_of", output_of)
    with pytest.raises(RuntimeError, match="enough"):
        decode_process.decode(Run("cpu", quick=True), "340m", 1)
    assert given == {**os.environ, "TVM_THREAD_POOL_SPIN_COUNT": "20000"}


def test_what_a_process_prints_comes_back_or_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert apart.output_of("this", timeout=600).startswith("The Zen of Python")
    with pytest.raises(RuntimeError, match=r"^no_such_module failed: .*No module named no_such_module$"):
        apart.output_of("no_such_module", timeout=600)

    def is_wrong(*_: object, **__: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: form is wrong\n")

    monkeypatch.setattr(subprocess, "run", is_wrong)
    with pytest.raises(ValueError, match=r"^this failed: ValueError: form is wrong$"):
        apart.output_of("this", timeout=600)

    def hangs(command: object, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(str(command), timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(RuntimeError, match=r"^this was killed after 9 s$"):
        apart.output_of("this", timeout=9)
