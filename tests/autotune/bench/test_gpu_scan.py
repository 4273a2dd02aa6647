"""The scan in a GPU's benchmark: what is timed, what is refused, what is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune.bench.gpu import scan
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import DEFAULT, FLOOR, TUNED
from ramnet import ops
from tests.autotune.bench.conftest import TINY, Kernels, forms
from tests.autotune.bench.tables import table


def test_the_scan_is_timed_in_every_form_with_the_bandwidth_bound(run: GpuRun, kernels: dict[str, Kernels]) -> None:
    (table,) = scan.memory_scan(run, TINY)
    assert not table.failed
    for name, each in kernels.items():
        row = table.row(name)
        assert row is not None and row.runs >= row.rounds == 3
        assert each.calls["memory_scan"] == each.calls["memory_scan_backward"] > row.runs, name
    assert forms(table) == {TUNED, DEFAULT, scan.CHUNKED, scan.SORTED, scan.FLASH, scan.CUDNN, FLOOR}
    assert table.base == TUNED and "B=2 H=2 T=9 K=3 M=9 D=4" in table.what
    assert run.facts["bandwidth of copies, bytes/s"] > 0


@pytest.mark.parametrize("off", [0.1, float("nan")])
def test_kernels_with_wrong_numbers_are_not_timed(run: GpuRun, kernels: dict[str, Kernels], off: float) -> None:
    kernels[TUNED].off = off
    tables = (*scan.memory_scan(run, TINY), *scan.beside_gla(run, TINY), *scan.lengths(run, TINY, tokens=(4,)))
    for found in tables:
        assert TUNED not in forms(found)
        assert f"{TUNED} is wrong: its result 0 is off by" in found.failed[TUNED]
    assert DEFAULT in forms(tables[0])


def test_the_scan_is_compared_with_gated_linear_attention(run: GpuRun, kernels: dict[str, Kernels], fla: None) -> None:
    (table,) = scan.beside_gla(run, TINY)
    assert kernels[TUNED].calls["memory_scan_backward"] > table.rows[0].runs and not kernels[DEFAULT].calls
    assert forms(table) == {TUNED, scan.GLA} and not table.failed
    assert "4 heads of keys of 128 and values of 256" in table.what


def test_a_form_of_the_kernels_is_checked_against_the_reference() -> None:
    """Without a GPU it is interpreted, but it is the kernel that a benchmark times."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, grads = scan.scan_inputs(scan.Sizes(1, 1, 2, 2, 1, 5, 4), device)
    expected = scan.training(inputs, grads)(ops.memory_scan)
    assert len(scan._one_form("h200", "slots", inputs, grads, expected)()) == 8


def test_the_bandwidth_bound_counts_inputs_and_outputs_of_both_passes_once() -> None:
    inputs, grads = scan.scan_inputs(TINY, "cpu")
    found = scan.training(inputs, grads)(ops.memory_scan)
    heads, tokens, k, m, d = 4, 9, 3, 9, 4
    forward = 2 * tokens * k * (4 + 2) + tokens * d * 2 + m * (d + 1) * 4
    results = tokens * d * 2 + m * (d + 1) * 4
    gradients = 2 * tokens * k * 2 + tokens * d * 2 + m * (d + 1) * 4
    assert scan.floor_bytes([*inputs, *grads], found) == heads * (2 * forward + 2 * results + gradients)


def test_a_copy_moves_the_bytes_of_the_bandwidth_bound(run: GpuRun) -> None:
    copied = run.copying(1000)()
    assert isinstance(copied, torch.Tensor) and copied.nbytes == 500 and int(copied.max()) > 0


def test_inputs_are_distinct_slots_and_weights_of_a_softmax_in_bfloat16() -> None:
    inputs, _ = scan.scan_inputs(TINY, "cpu")
    assert all(len(set(row)) == 3 for row in inputs.write_slots.view(-1, 3).tolist())
    assert inputs.write_weights.dtype == inputs.values.dtype == torch.bfloat16
    assert inputs.memory.dtype == inputs.mass.dtype == torch.float32


def test_a_form_with_wrong_numbers_is_not_timed(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = scan.eager_scan_gradients.ScanChunked.apply
    monkeypatch.setattr(scan.eager_scan_gradients, "scan_sorted", lambda *x: tuple(2 * y for y in doubled(*x)))
    (table,) = scan.memory_scan(run, TINY)
    assert scan.SORTED not in forms(table)
    assert "its result 0 is off by 1.0e+00; 6e-03 is allowed" in table.failed[scan.SORTED]


def test_a_form_that_runs_out_of_memory_does_not_affect_the_others(run: GpuRun) -> None:
    def exhausted() -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB; and more that nobody reads")

    makers = {"good": lambda: list, "large": lambda: exhausted, "early": exhausted}
    table = run.table("some", "what", makers, base="good")
    assert forms(table) == {"good"}
    assert table.failed == {"large": "out of memory", "early": "out of memory"}


def test_if_no_form_runs_the_table_has_the_reasons(run: GpuRun) -> None:
    def broken() -> Any:
        raise RuntimeError("no\nkernel")

    table = run.table("some", "what", {"a": broken}, base="a", slow=["a"])
    assert (table.rows, table.failed) == ([], {"a": "no kernel"})


def test_slow_forms_are_timed_together_with_the_base(run: GpuRun) -> None:
    table = run.table("some", "what", {"fast": lambda: list, "slow": lambda: list}, base="fast", slow=["slow"])
    assert table.row("slow").rounds == 3 and table.row("fast").ratio == 1.0


@pytest.mark.parametrize(("quicker", "found"), [((8, 16, 32), 8), ((2, 16, 32), 16), ((2, 4), None), ((), None)])
def test_the_crossover_is_the_length_from_which_the_scan_stays_faster(quicker: Any, found: int | None) -> None:
    tables = [
        table(f"scan and attention, T = {t}", TUNED, {TUNED: 1.0, scan.FLASH: 2.0 if t in quicker else 0.5})
        for t in (2, 4, 8, 16, 32)
    ]
    assert scan.crossover(tables) == found


def test_the_scan_is_compared_with_attention_by_length(run: GpuRun, kernels: dict[str, Kernels]) -> None:
    tables = scan.lengths(run, TINY, tokens=(4, 6))
    assert kernels[TUNED].calls["memory_scan_backward"] > sum(table.rows[0].runs for table in tables)
    assert [x.name for x in tables] == ["scan and attention, T = 4", "scan and attention, T = 6"]
    assert all(forms(x) == {TUNED, scan.FLASH, scan.CUDNN} for x in tables)
