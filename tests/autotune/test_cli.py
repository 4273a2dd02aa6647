"""``ramnet tune`` as a user types it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.call import _workloads, prepare
from autotune.study.worker import Worker
from lowering import use
from lowering.cpu import runtime
from ramnet.config import RamNetConfig
from ramnet.ops.backend import active, registered
from schedules import records
from tests.autotune.conftest import Command

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
pytest.importorskip("tvm", reason="tuning for the CPU needs tvm: pip install 'ramnet[tvm]'")


def test_a_small_model_is_tuned(ramnet: Command, tmp_path: Path) -> None:
    config = RamNetConfig(
        vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, value_dim=4, order=2, sub_dim=2, top_k=2
    )  # fmt: skip
    config.save(tmp_path / "model" / "config.json")
    status, out, _ = ramnet(
        "--checkpoint", tmp_path / "model", "--length", "8", "--trials", "1", "--threads", "1",
        "--op", "memory_step", "--op", "address_decode",
    )  # fmt: skip
    assert status == 0
    assert "tuned kernels against eager PyTorch" in out
    assert "schedules chosen" in out and "prefetch=" in out
    assert str(tmp_path / "records.jsonl") in out
    assert str(tmp_path / "runs" / "cpu" / "report.html") in out
    found = records.load(tmp_path / "records.jsonl")
    assert [record.workload.op for record in found] == ["address_decode", "address_decode", "memory_step"]
    assert {record.workload.shape["K"] for record in found} == {2}
    assert all(record.gain == 1.0 and record.eager.median > 0 for record in found)
    assert sorted(path.name for path in (tmp_path / "runs" / "cpu").iterdir()) == [
        ".journal.log.lock", "journal.log", "report.html",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--target", "abacus"), "ramnet: target 'abacus' is unknown; there are a10"),
        (("--budget", "0"), "ramnet: budget is 0.0; it must be above 0"),
        (("--preset", "huge"), "ramnet: preset 'huge' is unknown; there are 340m"),
        (("--budget", "nan"), "ramnet: budget is nan; it must be above 0"),
        (("--shape", "memory_scan"), "ramnet: shape 'memory_scan' lacks T"),
        (("--length", "0"), "ramnet: length is 0; it must be at least 1"),
        (("--length", "1000000000000"), "ramnet: address_decode has R = 32000000000000; kernels count in int32"),
        (("--build-limit", "nan"), "ramnet: build_limit is nan; it must be above 0 and at most 604800 seconds"),
        (("--build-limit", "-1"), "ramnet: build_limit is -1.0; it must be above 0"),
        (("--run-limit", "0"), "ramnet: run_limit is 0.0; it must be above 0"),
        (("--run-limit", "inf"), "ramnet: run_limit is inf; it must be above 0"),
        (("--records", ""), "ramnet: . is a folder; it must be a file"),
        (("--journal", "/dev/zero"), "ramnet: /dev/zero is not a regular file; it must be a file"),
        (("--output", "/dev/null/x"), "ramnet: /dev/null/x/cpu/journal.log cannot be written: Not a directory"),
        (("--journal", "same", "--records", "same"), "ramnet: same is given for two files"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(
    ramnet: Command, tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    status, out, err = ramnet(*arguments)
    assert (status, out, len(err.strip().splitlines())) == (1, "", 1)
    assert err.startswith(line)
    assert not list(tmp_path.iterdir())


def test_several_sizes_are_each_tuned_once_and_shapes_in_their_place() -> None:
    config = RamNetConfig.preset("tiny")
    many = _workloads(config, False, (1, 2), (64, 128), ())
    scans = [w.shape for w in many if w.op == "memory_scan"]
    assert [(s["N"] // config.num_heads, s["T"]) for s in scans] == [(1, 64), (1, 128), (2, 64), (2, 128)]
    assert len([w for w in many if w.op == "memory_step"]) == 2, "a token of each batch size"
    shapes = ("memory_scan T=5", "memory_step N=3", "memory_scan T=5")
    assert [w.name.partition(" K")[0] for w in _workloads(config, False, (2,), (64,), shapes)] == [
        f"memory_scan N={config.num_heads} T=5", "memory_step N=3",
    ]  # fmt: skip
    assert {w.dtype for w in _workloads(config, True, (), (), ("memory_scan T=5",))} == {"bfloat16"}


def test_the_help_says_where_records_go(ramnet: Command) -> None:
    status, out, _ = ramnet("--help")
    told = " ".join(out.split())
    assert status == 0 and "the target's in the user's data folder, or in the folder RAMNET_RECORDS" in told


@pytest.mark.parametrize("threads", ["0", "-1", "1025", "1e3"])
def test_an_invalid_number_of_threads_is_refused(ramnet: Command, tmp_path: Path, threads: str) -> None:
    status, out, err = ramnet("--threads", threads)
    assert (status, out) == (2, "")
    assert "Invalid value for '--threads'" in err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_records_that_is_a_file_is_one_line(
    command_line: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a letter\n")
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "file"))
    for verb in (("tune", "--output", tmp_path / "runs"), ("bench", "--output", tmp_path / "runs"), ("targets",)):
        assert command_line(*verb) == 1
        out, err = capfd.readouterr()
        assert (out, err) == ("", f"ramnet: RAMNET_RECORDS is {tmp_path / 'file'}, which is not a folder;"
                                  " it must name the folder of the records\n")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("library", ["matplotlib", "sklearn"])
def test_missing_libraries_of_the_report_are_named_before_the_search(
    ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == library else found(name))
    status, out, err = ramnet("--preset", "tiny", "--trials", "1")
    assert (status, out, len(err.strip().splitlines())) == (1, "", 1)
    assert "the report needs" in err and "pip install 'ramnet[tune]'" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "name"), [("--journal", "journal.log"), ("--records", "mine.jsonl")])
def test_a_foreign_file_is_one_line_and_left_alone(ramnet: Command, tmp_path: Path, option: str, name: str) -> None:
    (tmp_path / name).write_text("a letter\n")
    status, out, err = ramnet(option, tmp_path / name)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert f"{name}, line 1, is not a" in err
    assert (tmp_path / name).read_text() == "a letter\n"
    assert not (tmp_path / "records.jsonl").exists()


def test_without_tvm_it_says_what_to_install(ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(runtime, "_pool", runtime._Pool())
    runtime._ffi.cache_clear()
    status, out, err = ramnet()
    assert (status, out, len(err.strip().splitlines())) == (1, "", 1)
    assert "pip install 'ramnet[tvm]'" in err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_exits_130_and_leaves_no_record(
    ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Worker, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "open", interrupted)
    status, out, err = ramnet("--preset", "tiny", "--trials", "1")
    assert (status, out, err.strip()) == (130, "", "ramnet: interrupted")
    assert not (tmp_path / "records.jsonl").exists()
    assert not (tmp_path / "runs" / "cpu" / "report.html").exists()


def test_sizes_and_types_that_are_not_tuned_are_refused(ramnet: Command, tmp_path: Path) -> None:
    status, _, err = ramnet("--shape", "memory_step N=4", "--length", "77", "--output", tmp_path / "out")
    assert status == 2 and "--shape gives the sizes; omit --length and --batch-size" in err
    status, _, err = ramnet("--shape", "memory_step N=4 dtype=bfloat16", "--output", tmp_path / "out")
    assert status == 1 and "is of bfloat16; a CPU's kernels compute in float32 or float64" in err
    assert not (tmp_path / "out").exists()


def test_a_search_without_a_result_fails_and_names_no_records(
    ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.study.tuner.tune", lambda *_, **__: [])
    status, out, err = ramnet("--budget", "1", "--output", tmp_path / "out")
    assert status == 1 and "records:" not in out
    assert "no op had the time for a result; give a larger --budget" in err


def test_threads_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3}, raising=False)
    assert prepare(RamNetConfig.preset("tiny")).threads == 1


def test_schedules_are_chosen_anew_after_a_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of kernels that this process used before the search, too."""
    with use("cpu"):
        before = registered(active())
    monkeypatch.setattr("autotune.study.tuner.tune", lambda *_, **__: [])
    prepare(RamNetConfig.preset("tiny"), journal=tmp_path / "journal").run(lambda progress: None)
    with use("cpu"):
        assert registered(active()) is not before
