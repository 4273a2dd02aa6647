"""The benchmark of a GPU, tiny and on the CPU: its forms, rows of failures, goals, processes and report."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from autotune import spills
from autotune.bench import correlated, report
from autotune.bench import everything as on_cpu
from autotune.bench.cli import bench
from autotune.bench.correlated import FACT
from autotune.bench.gpu import apart, decode, everything, scan, training, warm
from autotune.bench.gpu.goals import DECODED, PLACED, TRAINED, goals
from autotune.bench.gpu.run import NO_FLA, GpuRun, without_fla
from autotune.bench.run import DEFAULT, FLOOR, TUNED, Row, Run, Table
from autotune.correlation import Correlation
from autotune.measure import interleaved
from lowering.offline import NoCompilerError
from lowering.work import Compiled, Resources, Work
from ramnet import RamNetConfig, ops
from schedules.gpu import SCHEDULES
from schedules.of_model import of_model
from schedules.workload import Workload

TINY = scan.Sizes(batch=2, heads=2, tokens=9, top_k=3, order=2, sub_dim=3, dim=4)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> GpuRun:
    """On the CPU, where the reference stands for the kernels: interpreted they would take seconds a call."""
    run = GpuRun("h200", quick=True, device="cpu")
    run.kernels = {DEFAULT: nullcontext, TUNED: nullcontext}
    monkeypatch.setattr("autotune.measure.SHORTEST_SAMPLE", 1e-6)
    shortly = lambda calls, rounds, seconds, clock: interleaved(calls, 3, 0.0, clock=clock)  # noqa: E731
    monkeypatch.setattr("autotune.bench.run.interleaved", shortly)
    monkeypatch.setattr(scan, "FORMS", ())
    return run


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's functions as its documentation has them, by their recurrences."""

    def recurrent_gla(q: Any, k: Any, v: Any, gk: Any, scale: Any = None, initial_state: Any = None,
                      output_final_state: bool = False) -> Any:  # fmt: skip
        state = torch.zeros(*k.shape[::2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
        out = []
        for t in range(q.shape[1]):
            state = gk[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            out.append((q[:, t, :, None].float() @ state.float())[:, :, 0])
        return torch.stack(out, 1).to(q.dtype) * q.shape[-1] ** -0.5, state

    def delta(q: Any, k: Any, v: Any, g: Any, beta: Any, initial_state: Any, output_final_state: bool,
              use_qk_l2norm_in_kernel: bool) -> Any:  # fmt: skip
        assert output_final_state and use_qk_l2norm_in_kernel and g.shape == beta.shape == q.shape[:3]
        return v, initial_state * g.exp()[:, 0, :, None, None]

    fla, package, gla, rule = (ModuleType(name) for name in ("fla", "fla.ops", "gla", "rule"))
    gla.chunk_gla = lambda q, k, v, g: recurrent_gla(q, k, v, g)  # type: ignore[attr-defined]
    gla.fused_recurrent_gla = recurrent_gla  # type: ignore[attr-defined]
    rule.fused_recurrent_gated_delta_rule = delta  # type: ignore[attr-defined]
    modules = {"fla": fla, "fla.ops": package, "fla.ops.gla": gla, "fla.ops.gated_delta_rule": rule}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def no_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.ops", "fla.ops.gla", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The skeletons of 340m with one layer, and no torch.compile."""
    config = RamNetConfig(
        vocab_size=11, hidden_size=32, num_layers=2, num_heads=2, value_dim=4, order=2, sub_dim=3, top_k=3,
        intermediate_size=8, cape_full_layers=1,
    )  # fmt: skip
    monkeypatch.setattr(RamNetConfig, "preset", lambda name: config)
    monkeypatch.setattr(training, "CHECKED_TOKENS", 5)
    monkeypatch.setattr("lowering.compile", lambda model, target, tuned=True: model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)


def forms(table: Table) -> set[str]:
    return {row.form for row in table.rows}


def test_the_scan_is_timed_in_every_form_beside_the_floor(run: GpuRun) -> None:
    (table,) = scan.memory_scan(run, TINY)
    assert not table.failed
    assert forms(table) == {TUNED, DEFAULT, scan.CHUNKED, scan.SORTED, scan.FLASH, scan.CUDNN, FLOOR}
    assert table.base == TUNED and "B=2 H=2 T=9 K=3 M=9 D=4" in table.what
    assert run.facts["bandwidth of copies, bytes/s"] > 0


def test_the_scan_is_timed_beside_gated_linear_attention(run: GpuRun, fla: None) -> None:
    (table,) = scan.beside_gla(run, TINY)
    assert forms(table) == {TUNED, scan.GLA} and not table.failed
    assert "4 heads of keys of 128 and values of 256" in table.what


def test_a_form_of_the_kernels_is_checked_against_the_reference() -> None:
    """Interpreted where there is no GPU, it is the same kernel that a benchmark times."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, grads = scan.scan_inputs(scan.Sizes(1, 1, 2, 2, 1, 5, 4), device)
    expected = scan.training(inputs, grads)(ops.memory_scan)
    assert len(scan._one_form("h200", "serial", inputs, grads, expected)()) == 8


def test_the_floor_is_every_input_and_output_of_both_passes_once() -> None:
    inputs, grads = scan.scan_inputs(TINY, "cpu")
    found = scan.training(inputs, grads)(ops.memory_scan)
    heads, tokens, k, m, d = 4, 9, 3, 9, 4
    forward = 2 * tokens * k * (4 + 2) + tokens * d * 2 + m * (d + 1) * 4
    results = tokens * d * 2 + m * (d + 1) * 4
    gradients = 2 * tokens * k * 2 + tokens * d * 2 + m * (d + 1) * 4
    assert scan.floor_bytes([*inputs, *grads], found) == heads * (2 * forward + 2 * results + gradients)


def test_a_copy_moves_the_floors_bytes(run: GpuRun) -> None:
    copied = run.copying(1000)()
    assert isinstance(copied, torch.Tensor) and copied.nbytes == 500 and int(copied.max()) > 0


def test_inputs_are_distinct_slots_and_weights_of_a_softmax_in_bfloat16() -> None:
    inputs, _ = scan.scan_inputs(TINY, "cpu")
    assert all(len(set(row)) == 3 for row in inputs.write_slots.view(-1, 3).tolist())
    assert inputs.write_weights.dtype == inputs.values.dtype == torch.bfloat16
    assert inputs.memory.dtype == inputs.mass.dtype == torch.float32


def test_a_library_that_is_missing_is_a_row_and_not_a_failure(run: GpuRun, no_fla: None, tiny: None) -> None:
    (scanned,) = scan.beside_gla(run, TINY)
    assert scanned.failed[scan.GLA] == NO_FLA and TUNED in forms(scanned)
    (decoded,) = decode.steps(run, batch=1, capture=lambda call: call)
    assert decoded.failed == {decode.GLA: NO_FLA, decode.DELTA: NO_FLA}
    (trained,) = training.step(run, batch=2, tokens=8)
    assert trained.failed == {training.GLA: NO_FLA} and forms(trained) == {TUNED}


def test_what_the_library_itself_lacks_is_said() -> None:
    lacking = ModuleNotFoundError("No module named 'einops'", name="einops")
    assert str(without_fla(lacking)) == "flash-linear-attention cannot be imported: No module named 'einops'"
    assert str(without_fla(ModuleNotFoundError("No module named 'fla'", name="fla.ops"))) == NO_FLA


def test_a_form_with_wrong_numbers_is_not_timed(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = scan.autograd.ScanChunked.apply
    monkeypatch.setattr(scan.autograd, "scan_sorted", lambda *x: tuple(2 * y for y in doubled(*x)))
    (table,) = scan.memory_scan(run, TINY)
    assert scan.SORTED not in forms(table)
    assert "its result 0 is off by 1.0e+00; 6e-03 is allowed" in table.failed[scan.SORTED]


def test_a_form_for_which_memory_does_not_suffice_leaves_the_others(run: GpuRun) -> None:
    def exhausted() -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB; and more that nobody reads")

    makers = {"good": lambda: list, "large": lambda: exhausted, "early": exhausted}
    table = run.table("some", "what", makers, base="good")
    assert forms(table) == {"good"}
    assert table.failed == {"large": "out of memory", "early": "out of memory"}


def test_where_no_form_runs_the_table_is_its_reasons(run: GpuRun) -> None:
    def broken() -> Any:
        raise RuntimeError("no\nkernel")

    table = run.table("some", "what", {"a": broken}, base="a", slow=["a"])
    assert (table.rows, table.failed) == ([], {"a": "no kernel"})


def test_slow_forms_are_timed_beside_the_base(run: GpuRun) -> None:
    table = run.table("some", "what", {"fast": lambda: list, "slow": lambda: list}, base="fast", slow=["slow"])
    assert table.row("slow").rounds == 3 and table.row("fast").ratio == 1.0


@pytest.mark.parametrize(("quicker", "found"), [((8, 16, 32), 8), ((2, 16, 32), 16), ((2, 4), None), ((), None)])
def test_the_crossover_is_the_length_from_which_the_scan_stays_faster(quicker: Any, found: int | None) -> None:
    tables = [
        table(f"scan and attention, T = {t}", TUNED, {TUNED: 1.0, scan.FLASH: 2.0 if t in quicker else 0.5})
        for t in (2, 4, 8, 16, 32)
    ]
    assert scan.crossover(tables) == found


def test_the_scan_is_compared_with_attention_by_length(run: GpuRun) -> None:
    tables = scan.lengths(run, TINY, tokens=(4, 6))
    assert [x.name for x in tables] == ["scan and attention, T = 4", "scan and attention, T = 6"]
    assert all(forms(x) == {TUNED, scan.FLASH, scan.CUDNN} for x in tables)


def test_decoding_compares_models_of_one_skeleton(run: GpuRun, fla: None, tiny: None) -> None:
    captures = itertools.count()
    run.quick = False
    (table,) = decode.steps(run, batch=3, capture=lambda call: (next(captures), call)[1])
    assert not table.failed
    peers = {decode.GLA, decode.DELTA, decode.GLA + decode.COMPILED, decode.DELTA + decode.COMPILED}
    assert forms(table) == {TUNED, DEFAULT, decode.AS_CALLED, *peers}
    assert next(captures) == len(peers) + 2, "all but the call as users make it are replayed from graphs"
    assert run.facts[f"{table.name}, {TUNED}, tokens/s"] == pytest.approx(3 / table.row(TUNED).seconds)


def test_the_states_of_340m_and_its_peers_are_stated() -> None:
    """RAM-Net's 28.75 M are the paper's; the peers' are those of 27 layers, which the paper has fewer of."""
    stated = decode._states(RamNetConfig.preset("340m"))
    assert stated == "float32 states of RAM-Net 28.8 M, GLA 3.5 M, Gated DeltaNet 10.6 M"


def test_decoding_late_starts_from_a_filled_state_at_a_million(
    run: GpuRun, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    real = decode._step
    monkeypatch.setattr(
        decode, "_step", lambda model, state, *x: (states.append(state.clone()), real(model, state, *x))[1]
    )
    (table,) = decode.by_position(run, batch=1, capture=lambda call: call)
    assert forms(table) == {"at position 1,000", "at position 1,000,000"} and table.base == "at position 1,000"
    assert [int(state.position) for state in states] == [1_000, 1_000_000]
    assert all(bool((x != 0).all()) for x in states[1].memory)


def test_kernels_that_decode_other_logits_are_a_failure(
    run: GpuRun, no_fla: None, tiny: None, monkeypatch: Any
) -> None:
    def twice(model: Any, target: str, tuned: bool = True) -> Any:
        def call(*x: Any, **named: Any) -> Any:
            found = model(*x, **named)
            return found._replace(logits=found.logits * (1 if tuned else 2))

        return call

    monkeypatch.setattr("lowering.compile", twice)
    (table,) = decode.steps(run, batch=1, capture=lambda call: call)
    assert DEFAULT not in forms(table) and TUNED in forms(table)
    assert "RAM-Net is wrong" in table.failed[DEFAULT]


def test_training_steps_are_compared_at_the_same_number_of_parts(run: GpuRun, fla: None, tiny: None) -> None:
    (table,) = training.step(run, batch=4, tokens=8)
    assert forms(table) == {TUNED, training.GLA} and not table.failed
    assert "4 sequences of 8 tokens in 2 parts" in table.what
    assert run.facts[f"{table.name}, {TUNED}, tokens/s"] == pytest.approx(32 / table.row(TUNED).seconds)


def test_a_step_that_memory_does_not_suffice_for_is_taken_in_more_parts(
    run: GpuRun, fla: None, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training._step

    def step(model: Any, ids: Any, parts: int, device: str) -> Any:
        if parts == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, parts, device)

    monkeypatch.setattr(training, "_step", step)
    (table,) = training.step(run, batch=4, tokens=8)
    assert forms(table) == {TUNED, training.GLA} and "in 4 parts" in table.what


def test_a_training_step_with_another_loss_is_a_failure(run: GpuRun, fla: None, tiny: None, monkeypatch: Any) -> None:
    def other(model: Any, target: str, tuned: bool = True) -> Any:
        return torch.nn.Sequential(model.embedding, torch.nn.Linear(32, 11), Doubled())

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return (9 * x,)

    monkeypatch.setattr("lowering.compile", other)
    (table,) = training.step(run, batch=2, tokens=8)
    assert forms(table) == {training.GLA} and "compiled its loss is" in table.failed[TUNED]


# Goals, on tables made by hand.


def table(name: str, base: str, times: dict[str, float], **failed: str) -> Table:
    rows = [Row(form, seconds, 0.1, seconds / times[base], 0.2, 7, 70) for form, seconds in times.items()]
    return Table(name, "what", 1, base, rows, failed)


def met(*tables: Table, **facts: float) -> dict[str, Any]:
    return {goal.name: goal for goal in goals({x.name: x for x in tables}, facts)}


SCAN = table(scan.NAME, TUNED, {TUNED: 2.0, FLOOR: 0.4, scan.CHUNKED: 500.0, scan.SORTED: 300.0})
BESIDE_GLA = table(scan.GLA_NAME, TUNED, {TUNED: 2.0, scan.GLA: 4.0})


def test_the_goals_of_the_scan() -> None:
    found = met(SCAN, BESIDE_GLA)
    goal = found["memory_scan forward + backward, tuned, over chunk_gla"]
    assert (goal.measured, goal.met) == (pytest.approx(0.5), True)
    goal = found["memory_scan forward + backward, tuned, over the floor"]
    assert (goal.measured, goal.met) == (pytest.approx(5.0), False)
    goal = found["memory_scan forward + backward over the quickest eager form"]
    assert (goal.measured, goal.met, goal.note) == (pytest.approx(150), False, scan.SORTED)


def test_the_goal_over_attention_is_that_of_the_worst_length() -> None:
    name = "memory_scan over FlashAttention, forward + backward, T = 8192 and up"
    at = {
        t: table(f"scan and attention, T = {t}", TUNED, {TUNED: 1.0, scan.FLASH: ratio})
        for t, ratio in ((4096, 0.5), (8192, 1.5), (16384, 2.0), (32768, 4.0))
    }
    goal = met(*at.values())[name]
    assert (goal.measured, goal.note, goal.met) == (1.5, "at T = 8192", True)
    del at[32768]
    goal = met(*at.values())[name]
    assert (goal.met, goal.note) == (None, "not measured at T = 32768; ")


def test_the_goals_of_decoding_and_training() -> None:
    decoded = table(DECODED, TUNED, {TUNED: 1.0, decode.GLA: 3.0, decode.GLA + decode.COMPILED: 1.5, decode.DELTA: 2.5})
    placed = table(PLACED, "at position 1,000", {"at position 1,000": 1.0, "at position 1,000,000": 1.02})
    trained = table(TRAINED, TUNED, {TUNED: 1.0, training.GLA: 1.1})
    found = met(decoded, placed, trained)
    over_gla, over_delta = (found[f"decode tokens/s, 340m, batch 64, over {x}"] for x in (decode.GLA, decode.DELTA))
    assert (over_gla.measured, over_gla.met, over_delta.met) == (1.5, False, True)
    assert over_gla.note.endswith("torch.compile"), "the quicker of a peer's forms counts"
    assert found["decode at 1 M tokens of context over at 1 k"].met is True
    assert found["training step tokens/s, 340m, 65 k tokens, over GLA layers"].met is True


def test_what_was_not_measured_is_said_with_the_reason() -> None:
    missing = table(scan.GLA_NAME, TUNED, {TUNED: 2.0}, **{scan.GLA: NO_FLA})
    goal = met(missing)["memory_scan forward + backward, tuned, over chunk_gla"]
    assert (goal.measured, goal.met, goal.note) == (None, None, NO_FLA)
    without_kernels = Table(scan.GLA_NAME, "what", 1, scan.GLA, [Row(scan.GLA, 1.0, 0, 1.0, 0, 7, 7)], {TUNED: "wrong"})
    goal = met(without_kernels)["memory_scan forward + backward, tuned, over chunk_gla"]
    assert (goal.met, goal.note) == (None, "wrong")
    assert all(goal.met is None for goal in met().values())


def test_facts_are_goals_where_the_issue_has_them() -> None:
    name = f"{FACT}, 1. memory_scan"
    found = met(**{name: 0.6, "bytes of registers spilled by 9 schedules for sm_80": 0.0})
    assert found[name].met is False
    assert found["bytes of registers spilled by 9 schedules for sm_80"].met is True


# Parts in processes of their own.


def test_a_part_that_fails_leaves_the_others_and_what_it_had_done() -> None:
    def measured(run: Run, part: str, seconds: float) -> list[Table]:
        if part == "attention":
            raise apart.PartError("CUDA error: an illegal memory access was encountered", [BESIDE_GLA])
        return [SCAN] if part == "scan" else []

    *_, found = everything.measure(Run("h200"), parts=["scan", "attention", "decode"], measured=measured)
    assert [x.name for x in found.tables] == [scan.NAME, scan.GLA_NAME, "attention"]
    assert found.tables[2].failed == {"all": "CUDA error: an illegal memory access was encountered"}
    assert set(found.facts) == {f"seconds that {part} took" for part in ("scan", "attention", "decode")}


def test_parts_that_would_begin_too_late_are_left_out() -> None:
    *_, found = everything.measure(Run("h200"), parts=["scan", "decode"], seconds=0, measured=lambda *_: [SCAN])
    assert [x.failed for x in found.tables] == [{"all": "left out: 0 s had passed"}] * 2


def said_by(run: GpuRun) -> bytes:
    """A part's output, among what libraries print, when it has two tables of which the second is not whole yet."""
    run.tables, run.facts, run.notices = [SCAN], {"fact": 1.5}, ["noted"]
    return f"chatter\n{apart.tell(run)}\nchatter\n".encode()


def test_a_part_comes_back_from_its_process(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, said_by(run), b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    parent = Run("h200")
    assert apart.measured(parent, "scan", 9.0) == [SCAN]
    assert (parent.facts, parent.notices) == ({"fact": 1.5}, ["noted"])


def test_a_part_tells_of_each_table_that_is_done(run: GpuRun) -> None:
    told: list[list[str]] = []
    run.on_table = lambda run: told.append([table.name for table in run.tables])
    for name in ("one", "two"):
        run.table(name, "what", {"form": lambda: list}, base="form")
    assert told == [["one"], ["one", "two"]]


def test_the_last_line_of_a_part_that_fails_is_its_reason(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, said_by(run), b"step\nout of memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(apart.PartError, match=r"^out of memory$") as caught:
        apart.measured(Run("h200"), "scan", 9.0)
    assert caught.value.tables == [SCAN]


def test_a_part_that_hangs_is_ended_and_what_it_had_done_is_kept(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    said = said_by(run)

    def hang(command: Any, timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout, said, b"checking GLA\n")

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(apart.PartError, match=r"took longer than 9 s; at last: checking GLA") as caught:
        apart.measured(Run("h200"), "scan", 9.0)
    assert caught.value.tables == [SCAN]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_process_of_a_part_without_a_gpu_says_so_in_one_line() -> None:
    with pytest.raises(apart.PartError) as caught:
        apart.measured(Run("h200"), "spills", 60.0)
    assert str(caught.value) and "\n" not in str(caught.value) and caught.value.tables == []


def test_the_report_says_what_failed(tmp_path: Path) -> None:
    failing = table(scan.NAME, TUNED, {TUNED: 2.0}, **{scan.GLA: NO_FLA})
    empty = Table("decode", "the whole part", 1, "", [], {"all": "out of memory"})
    found = report.Report([failing, empty], goals({failing.name: failing}, {}), {"fact": 2.0}, ["note"])
    paths = report.save(found, tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.md", "bench.png"]
    assert json.loads(paths[0].read_text())["tables"][1]["failed"] == {"all": "out of memory"}
    text = paths[1].read_text()
    assert f"| {scan.GLA} | {NO_FLA} |" in text and "| all | out of memory |" in text
    assert "not measured" in text and "- fact: 2" in text
    console = Console(record=True, width=200)
    report.show(found, console)
    assert NO_FLA in console.export_text()


# The command.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["--target", "h200", "--output", str(tmp_path / "new")])
    assert isinstance(result.exception, RuntimeError) and "there is no GPU here for target 'h200'" in str(
        result.exception
    )
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowering import targets

    monkeypatch.setattr(targets, "here", lambda: targets.find("h100"))
    everything.check_target("h100")
    with pytest.raises(ValueError, match="'h200' is not this machine's GPU: that is h100"):
        everything.check_target("h200")
    with pytest.raises(ValueError, match="'cpu' is no GPU"):
        everything.check_target("cpu")


def test_the_command_writes_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def measured(run: Run, part: str, seconds: float) -> list[Table]:
        written.append((tmp_path / "bench.json").exists())
        return [SCAN] if part == "scan" else []

    monkeypatch.setattr(everything, "check_target", lambda target: None)
    monkeypatch.setattr(
        everything.measure, "__kwdefaults__", {**everything.measure.__kwdefaults__, "measured": measured}
    )
    result = CliRunner().invoke(bench, ["--target", "h200", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert written == [False, *[True] * (len(apart.PARTS) - 1)]
    assert scan.CHUNKED in (tmp_path / "bench.md").read_text()


def test_single_parts_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    named = {**everything.measure.__kwdefaults__, "measured": lambda run, part, seconds: asked.append(part) or []}
    monkeypatch.setattr(everything, "check_target", lambda target: None)
    monkeypatch.setattr(everything.measure, "__kwdefaults__", named)
    words = ["--target", "h200", "--output", str(tmp_path), "--part"]
    assert CliRunner().invoke(bench, [*words, "decode", "--part", "scan"]).exit_code == 0
    assert asked == ["decode", "scan"]
    unknown = CliRunner().invoke(bench, [*words, "scna"]).exception
    assert str(unknown).startswith("part 'scna' is unknown; there are scan, attention")
    on_the_cpu = CliRunner().invoke(bench, ["--part", "scan", "--output", str(tmp_path)]).exception
    assert str(on_the_cpu) == "--part scan is for GPUs; on the CPU all is measured"


# Other libraries' kernels, compiled beforehand.


def test_each_process_compiles_its_share_of_the_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "__init__", Autotuner.__init__)  # put back afterwards
    warm.take_share(1, 3)

    def kept(count: int) -> list[int]:
        configs = [triton.Config({"BLOCK": i}) for i in range(count)]

        @triton.autotune(configs=configs, key=["n"])
        @triton.jit
        def kernel(n, BLOCK):
            pass

        return [config.kwargs["BLOCK"] for config in kernel.configs]

    assert kept(7) == [1, 4]
    assert kept(1) == [0], "a kernel needs a schedule"


def test_without_the_library_nothing_is_compiled(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert warm.peers(run) == []


def test_processes_that_fail_to_compile_are_noted(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Side:
        def __init__(self, command: list[str], **_: Any) -> None:
            self.code = int(command[-2] == "3")

        def wait(self, timeout: float) -> int:
            return self.code

        def kill(self) -> None:
            pass

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "Popen", Side)
    warm.peers(run)
    assert run.notices == ["1 of 12 processes that compile flash-linear-attention's kernels failed"]


# Spills.


def test_each_shipped_schedule_is_compiled_once_an_architecture() -> None:
    asked = []

    def compiled(workload: Workload, target: str, schedule: Any) -> list[Compiled]:
        asked.append((workload.kernel_name, schedule))
        if workload.op == "memory_step":
            raise NoCompilerError("no TVM")
        work = Work(programs=1, threads=32, dram_bytes=0, cache_bytes=0, operations=0)
        return [Compiled("a", work, Resources(9, 8, 8, 0)), Compiled("b", work, Resources(9, 4, 4, 0))]

    found = list(spills.spilled("sm_90", compiled))
    assert len(asked) == len(set(asked)) >= 6
    assert {x.found for x in found if x.workload.op != "memory_step"} == {12}
    assert {(x.found, x.reason) for x in found if x.workload.op == "memory_step"} == {(None, "no TVM")}


def test_both_architectures_have_schedules_for_every_op() -> None:
    for arch in spills.ARCHITECTURES:
        assert {workload.op for _, workload, _ in spills.shipped(arch)} == set(SCHEDULES)


# The time model against measurements.


def test_the_model_is_compared_with_measurements_where_there_is_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    workloads = of_model(RamNetConfig.preset("340m"))[:3]
    answers = iter([Correlation(0.8, ()), Correlation(None, (), "no order to tell"), RuntimeError("the default fails")])

    def compared(target: str, workload: Workload, seconds: float) -> Correlation:
        assert (target, seconds) == ("cpu", 10)
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    monkeypatch.setattr(correlated, "rank_correlation", compared)
    run = Run()
    correlated.ops(run, workloads, 30)
    assert run.facts == {f"{FACT}, 1. address_decode": 0.8}
    assert [notice.rpartition(": ")[2] for notice in run.notices] == [
        "0.80 (0 schedules)", "no order to tell (0 schedules)", "the default fails"
    ]  # fmt: skip


def test_a_quick_run_on_the_cpu_leaves_the_model_out() -> None:
    run = Run(quick=True)
    on_cpu._correlate(run)
    assert run.notices == [f"{FACT} left out of a quick run"]
