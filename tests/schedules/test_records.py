"""Records: merged by workload and device, looked up exactly, then nearest, then not at all."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import sys
from pathlib import Path

import platformdirs
import pytest

from lowering.targets import TARGETS
from schedules import records
from schedules.cpu import MemoryStep
from schedules.gpu import SCHEDULES
from schedules.kinds import default_schedule
from schedules.records import MOST_BYTES, Record, Time, choose, known, load, merge, records_path, shipped_path
from schedules.workload import AXES, Workload

CONSTANTS = {"decay_power": 1.0, "eps": 1e-6}


def step(**sizes: int) -> Workload:
    return Workload(op="memory_step", shape={"N": 16, "K": 8, "M": 1024, "D": 64} | sizes, constants=CONSTANTS)


def record(workload: Workload, unroll: int = 4, device: str = "here", how: str = "measured") -> Record:
    time = Time(median=1e-6, spread=1e-7, runs=9)
    return Record(
        workload=workload, target="cpu", device=device,
        knobs={"tile": 8, "unroll": unroll, "parallel": False, "prefetch": 0},
        how=how, gain=1.5, gain_spread=0.1, tuned=time, default=time, eager=time, trials=3, fingerprint="f",
        versions={"apache-tvm": "0"}, date="2026-01-01",
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's records, with no shipped ones."""
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "none")
    return records_path("cpu")


def test_exact_record_wins(file: Path) -> None:
    merge(file, [record(step(), unroll=2), record(step(D=128), unroll=4)])
    choice = choose(step(), "cpu", "here")
    assert choice.source == "record"
    assert choice.schedule == MemoryStep(tile=8, unroll=2, parallel=False, prefetch=0)


def test_nearest_record_that_fits_comes_next(file: Path) -> None:
    merge(file, [record(step(M=4096), unroll=2), record(step(M=1 << 20), unroll=4)])
    assert choose(step(M=2048), "cpu", "here").schedule.unroll == 2
    assert choose(step(M=2048), "cpu", "here").source.startswith("nearest: memory_step N=16 K=8 M=4096")
    merge(file, [record(step(M=1024, D=512), unroll=8)])
    assert choose(step(M=1024, D=32), "cpu", "here").schedule.unroll == 2, "3 doublings, against 4 from D = 512"
    assert choose(step(M=512, D=128), "cpu", "here").schedule.unroll == 8, "3 doublings, against 4 from M = 4096"
    assert choose(step(M=256), "cpu", "here").schedule.unroll == 2, "4 doublings from M = 4096 are near enough"
    assert choose(step(M=128), "cpu", "here").source == "default", "5 are not"
    # tile = 8 does not divide 12 channels, so neither record is valid.
    assert choose(step(D=12), "cpu", "here").source == "default"


def test_at_equal_distance_a_record_of_this_device_is_preferred(file: Path) -> None:
    merge(file, [record(step(), unroll=2, device="elsewhere"), record(step(), unroll=4, device="here")])
    assert choose(step(), "cpu", "here").schedule.unroll == 4
    assert choose(step(), "cpu", "elsewhere").schedule.unroll == 2
    assert choose(step(), "cpu", "a third").source.startswith("nearest")


def test_schedules_that_cannot_be_built_here_are_ignored(file: Path) -> None:
    merge(file, [record(step(), unroll=4)])
    choice = choose(step(), "cpu", "here", lambda schedule: "no compiler" if schedule.unroll == 4 else None)
    assert (choice.source, choice.schedule) == ("default", MemoryStep.default(step()))


def test_without_records_the_default_is_taken(file: Path) -> None:
    assert not file.exists()
    assert choose(step(), "cpu", "here").source == "default"


def test_merging_replaces_by_workload_and_device_and_keeps_the_file_sorted(file: Path) -> None:
    merge(file, [record(step(M=64)), record(step(M=16))])
    merge(file, [record(step(M=64), unroll=8)])
    rows = load(file)
    assert [r.workload.shape["M"] for r in rows] == [16, 64]
    assert rows[1].knobs["unroll"] == 8
    assert file.read_text().count("\n") == 2


def merge_one_by_one(path: Path, process: int) -> None:
    for i in range(15):
        merge(path, [record(step(), device=f"{process}, {i}")])


def test_several_processes_merge_at_once_and_no_row_is_lost(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=merge_one_by_one, args=(file, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {row.device for row in load(file)} == {f"{process}, {i}" for process in range(4) for i in range(15)}
    assert [path.name for path in file.parent.iterdir()] == ["cpu.jsonl"], "no other file is left"


def test_a_changed_file_is_read_again(file: Path) -> None:
    """Even if the second change is within one tick of the file system's clock."""
    merge(file, [record(step(), unroll=2)])
    before = file.stat()
    assert load(file)[0].knobs["unroll"] == 2
    merge(file, [record(step(), unroll=4)])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(file)[0].knobs["unroll"] == 4


def test_records_are_merged_into_the_target_of_a_link(file: Path) -> None:
    shared = file.parent / "shared.jsonl"
    file.symlink_to(shared.name)
    shared.touch()
    merge(file, [record(step())])
    assert file.is_symlink() and len(load(shared)) == 1


def test_modelled_never_replaces_measured(file: Path) -> None:
    merge(file, [record(step(), unroll=2)])
    merge(file, [record(step(), unroll=8, how="modelled, not run")])
    assert load(file)[0].knobs["unroll"] == 2
    merge(file, [record(step(M=16), unroll=2, how="modelled, not run")])
    merge(file, [record(step(M=16), unroll=8)])
    assert {row.workload.shape["M"]: (row.how, row.knobs["unroll"]) for row in load(file)} == {
        1024: ("measured", 2), 16: ("measured", 8),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["not json\n", '{"some": "json"}\n', "[]\n", "\n", "{", "[" * 100_000])
def test_foreign_file_is_refused_with_its_line_and_left_alone(file: Path, text: str) -> None:
    merge(file, [record(step())])
    file.write_text(file.read_text() + text)
    before = file.read_text()
    with pytest.raises(ValueError, match=r"cpu\.jsonl, line 2, is not a record"):
        choose(step(), "cpu", "here")
    with pytest.raises(ValueError, match="line 2"):
        merge(file, [record(step())])
    assert file.read_text() == before


@pytest.mark.parametrize("number", ["NaN", "Infinity", "null"])
def test_values_that_json_lacks_are_refused(file: Path, number: str) -> None:
    """JSON has none of these values: merging would write the first two as null and so damage the file."""
    file.write_text(record(step()).model_dump_json().replace('"gain":1.5', f'"gain":{number}') + "\n")
    with pytest.raises(ValueError, match=r"cpu\.jsonl, line 1, is not a record: gain = "):
        load(file)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"prefetch":0', '"prefetch":-1', "knobs.prefetch is -1; it must be in 0..65536"),
        ('"prefetch":0', '"prefetch":65537', "knobs.prefetch is 65537"),
        ('"median":1e-6', '"median":0', "median = 0"),
        ('"spread":1e-7', '"spread":-1', "spread = -1"),
        ('"runs":9', '"runs":-1', "runs = -1"),
        ('"N":16', '"N":0', "workload.shape.N is 0; it must be at least 1"),
        ('"decay_power":1.0', '"decay_power":-1', "decay_power is -1.0; it must be finite"),
        ('"eps":1e-6', '"eps":0', "eps is 0.0; it must be > 0"),
        ('"eps":1e-6', '"eps":1e-6,"foo":1.0', "workload.constants has 'foo'; there are decay_power, eps and proxy"),
    ],
)
def test_what_no_kernel_has_is_refused(file: Path, old: str, new: str, why: str) -> None:
    text = record(step()).model_dump_json()
    assert old in text
    file.write_text(text.replace(old, new) + "\n")
    with pytest.raises(ValueError, match=rf"cpu\.jsonl, line 1, is not a record: .*{re.escape(why)}"):
        load(file)
    with pytest.raises(ValueError, match="decay_power is inf"):
        record(step().model_copy(update={"constants": CONSTANTS | {"decay_power": math.inf}}))


def test_targets_may_share_a_file(file: Path) -> None:
    """As those of an export do; each has its own rows of a workload, measured or modelled."""
    gpu = record(step()).model_copy(update={"target": "a100", "device": "a100", "how": "modelled, not run"})
    gpu = gpu.model_copy(update={"device": "here", "knobs": default_schedule(step(), "a100").model_dump()})
    for order in ((record(step()), gpu), (gpu, record(step()))):
        file.unlink(missing_ok=True)
        for each in order:
            assert merge(file, [each]) == []
        assert [row.target for row in load(file)] == ["a100", "cpu"]
        for target in ("a100", "cpu"):
            assert [row.target for row in known(target, file)] == [target]


def test_a_folder_is_the_users_home_or_stays_where_it_was_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAMNET_RECORDS", "~/mine")
    assert records_path("cpu") == tmp_path / "mine" / "cpu.jsonl"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAMNET_RECORDS", f"beside-{tmp_path.name}")
    first = records_path("cpu")
    monkeypatch.chdir("/")
    assert records_path("cpu") == first == tmp_path / f"beside-{tmp_path.name}" / "cpu.jsonl"


def test_without_a_home_folder_shipped_records_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RAMNET_RECORDS", raising=False)
    monkeypatch.setattr("platformdirs.user_data_path", unknown)
    assert records.known("cpu") == load(records.shipped_path("cpu"))


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"cpu\.jsonl is not a text file"):
        load(file)


def test_a_line_ends_where_json_lines_do(file: Path) -> None:
    named = record(step(), device="a\u2028b\x0cc\x85d")
    merge(file, [named])
    assert load(file) == [named]
    file.write_text(file.read_text().replace("\n", "\r\n"))  # as git may write it on Windows
    assert load(file) == [named]


def test_a_file_of_a_million_rows_is_refused_before_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file.open("wb") as rows:
        rows.truncate(MOST_BYTES + 1)
    monkeypatch.setattr(records, "read_text", lambda path: pytest.fail("the file was read"))
    with pytest.raises(
        ValueError, match=rf"cpu\.jsonl has {MOST_BYTES + 1} bytes; records are read up to {MOST_BYTES}"
    ):
        choose(step(), "cpu", "here")


def test_a_path_that_is_not_a_file_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"cpu\.jsonl is not a file"):
        choose(step(), "cpu", "here")
    monkeypatch.setenv("RAMNET_RECORDS", str(file))
    with pytest.raises(ValueError, match=r"RAMNET_RECORDS is .*cpu\.jsonl, which is not a folder"):
        choose(step(), "cpu", "here")


def test_records_are_stored_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAMNET_RECORDS", raising=False)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        assert records_path("cpu") == tmp_path / "ramnet" / "records" / "cpu.jsonl"
    assert records_path("cpu") == platformdirs.user_data_path("ramnet", appauthor=False) / "records" / "cpu.jsonl"
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "mine"))
    assert records_path("cpu") == tmp_path / "mine" / "cpu.jsonl"
    assert not list(tmp_path.iterdir()), "looking up the path creates nothing"


def test_shipped_records_are_read_if_the_user_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "nowhere"))
    assert shipped_path("cpu") == Path(__file__).parents[2] / "schedules" / "records" / "cpu.jsonl"
    shipped = load(shipped_path("cpu"))
    assert known("cpu") == shipped
    found = next(record for record in shipped if record.workload.op == "memory_step")
    assert choose(found.workload, "cpu", found.device).source == "record"
    other = found.model_copy(update={"knobs": MemoryStep.default(found.workload).model_dump(), "gain": 1.0})
    before = shipped_path("cpu").read_bytes()
    merge(records_path("cpu"), [other, record(step(D=16))])
    assert [row for row in known("cpu") if row.key == found.key] == [other], "the user's record comes first"
    assert len(known("cpu")) == len(shipped) + 1
    assert choose(found.workload, "cpu", found.device).record == other
    assert shipped_path("cpu").read_bytes() == before


def test_knobs_of_another_op_are_refused(file: Path) -> None:
    bad = record(step()).model_copy(update={"knobs": {"lanes": 8}})
    file.write_text(bad.model_dump_json() + "\n")
    with pytest.raises(ValueError, match="line 1, is not a record"):
        load(file)


def test_a_record_of_an_op_without_a_kernel_is_refused_with_its_line(file: Path) -> None:
    heads = Workload(op="decode_heads", shape=dict.fromkeys(AXES["decode_heads"], 2))
    file.write_text(record(heads).model_dump_json() + "\n")
    with pytest.raises(ValueError, match=r"cpu\.jsonl, line 1, is not a record: decode_heads has no kernel for cpu"):
        load(file)


def test_records_of_a_form_that_was_removed_are_ignored(file: Path) -> None:
    scan = Workload(op="memory_scan_backward", shape=dict.fromkeys(AXES["memory_scan_backward"], 2))
    former = {"form": "serial", "tile": 64, "threads": 64, "spans": 1, "checkpoint": 256}
    old = record(scan).model_copy(update={"target": "h200", "knobs": former})
    path = file.with_name("h200.jsonl")
    path.write_text(old.model_dump_json() + "\n")
    assert load(path) == []
    assert choose(scan, "h200", "here").source == "default"


def test_records_of_another_target_are_ignored(file: Path) -> None:
    merge(file, [record(step())])
    file.rename(records_path("h200"))
    assert choose(step(), "h200", "here").source == "default"


def test_workload_axes_are_checked() -> None:
    with pytest.raises(ValueError, match="memory_step has the axes N K M D, not N K"):
        Workload(op="memory_step", shape={"N": 1, "K": 1})


def test_sizes_that_kernels_cannot_count_are_refused() -> None:
    with pytest.raises(ValueError, match="address_decode has R = 2147483648; kernels count in int32, to 2147483647"):
        Workload(op="address_decode", shape={"R": 2**31, "U": 5, "P": 4, "K": 8})


def test_shipped_records_are_valid_and_measured() -> None:
    shipped = load(Path(__file__).parents[2] / "schedules" / "records" / "cpu.jsonl")
    assert {r.workload.op for r in shipped} == {
        "address_decode", "address_decode_backward", "memory_scan", "memory_scan_backward", "memory_step",
    }  # fmt: skip
    assert "here" not in {r.device for r in shipped}, "no record of these tests is shipped"
    assert all(r.how == "measured" and r.tuned.median > 0 and r.schedule().refusal(r.workload) is None for r in shipped)


@pytest.mark.parametrize("target", sorted(name for name, target in TARGETS.items() if target.gpu is not None))
def test_shipped_gpu_records_are_valid_and_have_no_spills(target: str) -> None:
    shipped = load(Path(__file__).parents[2] / "schedules" / "records" / f"{target}.jsonl")
    assert {r.workload.op for r in shipped} == set(SCHEDULES)
    for r in shipped:
        assert r.target == target and r.schedule().refusal(r.workload) is None
        assert r.knobs == r.schedule().model_dump(), "only the knobs of the form"
        if r.how == "measured":
            assert r.device != target, "measured records name the device"
        else:
            assert r.launches and all(launch.registers > 0 for launch in r.launches)
        assert all(launch.spilled == 0 for launch in r.launches)


def test_a_modelled_row_of_a_measured_workload_is_left_out_and_said_so(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    merge(file, [record(step(), unroll=2)])
    modelled = record(step(), unroll=4, device="elsewhere").model_copy(update={"how": "modelled, not run"})
    assert merge(file, [modelled]) == [modelled]
    assert merge(file, [record(step(), unroll=2)]) == []
    assert [row.how for row in load(file)] == ["measured"]
