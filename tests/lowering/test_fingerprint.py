"""Fingerprints depend on the code of an op's kernel and on its compilers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from lowering import fingerprint as module
from lowering import nvcc
from lowering.fingerprint import code, fingerprint, stale, versions
from lowering.targets import TARGETS, gpu_of
from schedules import cpu, gpu
from schedules.base import Schedule
from schedules.cpu import MemoryStep
from schedules.gpu import MemoryStep as GpuStep
from schedules.gpu import SharedScan
from schedules.records import How, Record, Time
from schedules.workload import Workload

READ = module._read.__wrapped__
STEP = MemoryStep(tile=8, unroll=4, parallel=False, prefetch=0)
WORKLOAD = Workload(op="memory_step", shape={"N": 16, "K": 8, "M": 1024, "D": 64})


@pytest.fixture
def fresh() -> Iterator[None]:
    """Clear the caches before the test, and after it, as it may alter what they hold."""
    remembered = (module._digests, module.package_versions, nvcc.version)
    for each in remembered:
        each.cache_clear()
    yield
    for each in remembered:
        each.cache_clear()


def alter(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Add a statement to a module. What was read of other modules is kept: reading all takes half a second."""
    parse, kept, altered_read = module._parse, module._read, cache(READ)

    def altered(read: str) -> ast.Module:
        tree = parse(read)
        if read == name:
            tree.body += ast.parse("more = 1").body
        return tree

    monkeypatch.setattr(module, "_parse", altered)
    monkeypatch.setattr(module, "_read", lambda read: altered_read(read) if read == name else kept(read))
    module._digests.cache_clear()


def record(**changes: object) -> Record:
    time = Time(median=1e-6, spread=1e-7, runs=9)
    return Record(
        workload=WORKLOAD, target="cpu", device="here", knobs=STEP.model_dump(), how="measured", gain=1.5,
        gain_spread=0.1, tuned=time, default=time, eager=time, trials=3, date="2026-01-01", versions=versions("cpu"),
        fingerprint=fingerprint("memory_step", "cpu", STEP),
    ).model_copy(update=changes)  # fmt: skip


LINES = (
    '"""What it is."""',
    "import math",
    "def area(r):",
    '    """Of a disc."""',
    "    return math.pi * r ** 2  # exact",
)


@pytest.mark.parametrize(
    ("lines", "same"),
    [
        (("import math", "def area(r):", "    return math.pi * r**2"), True),
        (
            ("import math", "def area(r):", "    # Of a disc.", "    'a text'", "", "    return (math.pi * r ** 2)"),
            True,
        ),
        (("import math", "def area(r):", "    return math.pi * r ** 3"), False),
        (("import math", "def area(d):", "    return math.pi * d ** 2"), False),
        (("import math", "def area(r):", "    return None"), False),
    ],
)
def test_code_changes_the_fingerprint_but_comments_docstrings_and_spaces_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], same: bool, fresh: None
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in (("disc_of_one_kind", LINES), ("disc_of_another", lines)):
        (tmp_path / f"{name}.py").write_text("\n".join(text) + "\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    module._find.cache_clear()
    module._read.cache_clear()
    assert (code("disc_of_one_kind") == code("disc_of_another")) == same
    assert (code("disc_of_one_kind:area") == code("disc_of_another:area")) == same


def test_the_code_of_one_function_does_not_depend_on_others(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    whole, alone = code("lowering.cpu.build"), code("lowering.cpu.build:compile_now")
    alter(monkeypatch, "lowering.cpu.build")
    assert (code("lowering.cpu.build") == whole, code("lowering.cpu.build:compile_now") == alone) == (False, True)


def cases() -> list[tuple[str, str, Schedule]]:
    """Return the default schedule of each op for a CPU and, by compiler and form, for a GPU."""
    found: list[tuple[str, str, Schedule]] = [
        (op, "cpu", kind.model_construct()) for op, kind in cpu.SCHEDULES.items()
    ]  # fmt: skip
    for op, forms in gpu.SCHEDULES.items():
        for form, kind in forms.items():
            compilers = [{}] if form else [{"compiler": "triton"}, {"compiler": "tir"}]
            found += [(op, "a100", kind(**each)) for each in compilers]
    return found


@pytest.mark.parametrize(("op", "target", "schedule"), cases())
def test_each_kernel_has_a_fingerprint_of_its_own_files(
    op: str, target: str, schedule: Schedule, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    (template,) = module._templates(op, target, schedule)
    used = module.closure([template])
    assert template in used and len(used) > 2
    assert all(name.startswith(("lowering.", "schedules.")) for name in used)
    before, of_all = fingerprint(op, target, schedule), fingerprint(op, target)
    alter(monkeypatch, template)
    assert fingerprint(op, target, schedule) != before
    assert fingerprint(op, target) != of_all, "a search depends on each kernel of its op"


def test_a_fingerprint_does_not_depend_on_other_ops(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def prints() -> list[str]:
        ops = ("memory_step", "memory_scan", "address_decode")
        return [fingerprint(op, "cpu") for op in ops] + [fingerprint("memory_scan", "a100")]

    before = prints()
    (step,) = module._templates("memory_step", "cpu", None)
    alter(monkeypatch, step)
    changed = [a != b for a, b in zip(before, prints(), strict=True)]
    assert changed == [True, False, False, False]


def test_compilers_and_flags_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    tir, triton = GpuStep(compiler="tir"), GpuStep(compiler="triton")
    monkeypatch.setattr(nvcc, "version", lambda: "13.0.1")
    assert versions("a100", tir)["nvcc"] == "13.0.1" and "triton" not in versions("a100", tir)
    assert {*versions("a100", triton)} == {"triton"}
    before = [fingerprint("memory_step", "a100", schedule) for schedule in (tir, triton)]
    module.package_versions.cache_clear()
    monkeypatch.setattr(nvcc, "version", lambda: "13.0.2")
    newer = [fingerprint("memory_step", "a100", schedule) for schedule in (tir, triton)]
    assert (newer[0] == before[0], newer[1] == before[1]) == (False, True)
    alter(monkeypatch, "lowering.nvcc")  # nvcc's flags
    flagged = [fingerprint("memory_step", "a100", schedule) for schedule in (tir, triton)]
    assert (flagged[0] == newer[0], flagged[1] == before[1]) == (False, True)


def test_a_record_is_stale_if_its_code_or_compilers_have_changed(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    assert stale(record()) is None
    made_by = versions("cpu") | {"apache-tvm": "0.1"}
    older = record(versions=made_by, fingerprint=fingerprint("memory_step", "cpu", STEP, made_by))
    assert stale(older) == "apache-tvm 0.1"
    assert stale(record(fingerprint="of other code")) == "other code"
    (template,) = module._templates("memory_step", "cpu", STEP)
    alter(monkeypatch, template)
    assert stale(record(fingerprint=record().fingerprint)) is None
    assert stale(older) == "other code"


def test_a_compiler_that_is_not_installed_does_not_make_a_record_stale(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    schedule = SharedScan()
    workload = WORKLOAD.model_copy(update={"op": "memory_scan", "shape": {"N": 1, "T": 1, **WORKLOAD.shape}})
    monkeypatch.setattr(nvcc, "version", lambda: "13.0.1")
    made = record(
        workload=workload, target="a100", knobs=schedule.model_dump(), versions=versions("a100", schedule),
        fingerprint=fingerprint("memory_scan", "a100", schedule),
    )  # fmt: skip
    for here, why in (("13.0.1", None), (None, None), ("13.2", "nvcc 13.0.1")):
        module.package_versions.cache_clear()
        monkeypatch.setattr(nvcc, "version", lambda here=here: here)
        assert stale(made) == why


@pytest.mark.parametrize(("op", "target", "schedule"), [case for case in cases() if case[1] != "cpu"])
def test_the_fingerprint_of_a_modelled_time_also_depends_on_the_model_and_its_inputs(
    op: str, target: str, schedule: Schedule, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    def prints() -> tuple[str, str]:
        return fingerprint(op, target, schedule), fingerprint(op, target, schedule, how="modelled, not run")

    measured, modelled = prints()
    alter(monkeypatch, "autotune.model.gpu")
    by_another_model = prints()
    assert (by_another_model[0] == measured, by_another_model[1] == modelled) == (True, False)
    known = TARGETS[target]
    monkeypatch.setitem(TARGETS, target, replace(known, gpu=replace(gpu_of(target), bandwidth=1e9)))
    with_other_memory = prints()
    assert (with_other_memory[0] == measured, with_other_memory[1] == by_another_model[1]) == (True, False)
    if module._compilers(target, schedule) == ("tir",):  # the modules that plan Triton's kernels also count their work
        alter(monkeypatch, module._WORK[op])
        with_other_counts = prints()
        assert (with_other_counts[0] == measured, with_other_counts[1] == with_other_memory[1]) == (True, False)
        alter(monkeypatch, "lowering.gpu.instructions")
        of_other_instructions = prints()
        assert (of_other_instructions[0] == measured, of_other_instructions[1] == with_other_counts[1]) == (True, False)


def test_a_modelled_record_is_stale_if_the_time_model_has_changed(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    schedule = GpuStep(compiler="triton")
    measured, modelled = (
        record(
            target="a100", knobs=schedule.model_dump(), versions=versions("a100", schedule), how=how,
            fingerprint=fingerprint("memory_step", "a100", schedule, how=how),
        ) for how in get_args(How)
    )  # fmt: skip
    assert (measured.how, stale(measured), stale(modelled)) == ("measured", None, None)
    alter(monkeypatch, "autotune.model.gpu")
    assert (stale(measured), stale(modelled)) == (None, "other code")


def test_the_version_of_nvcc_is_read_from_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    program = tmp_path / "nvcc"
    program.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n')
    program.chmod(0o755)
    monkeypatch.setattr(nvcc, "nvcc", lambda: str(program))
    assert nvcc.version() == "13.0.88"
    nvcc.version.cache_clear()
    monkeypatch.setattr(nvcc, "nvcc", lambda: None)
    assert nvcc.version() is None
