"""The forms of a GPU's benchmark, tiny and on the CPU: what is timed, what is refused, what is missing."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from autotune.bench.gpu import decode_step, scan, training
from autotune.bench.gpu.run import NO_FLA, GpuRun, without_fla
from autotune.bench.run import DEFAULT, FLOOR, TUNED, Table
from autotune.measure.timing import interleaved
from ramnet import RamNetConfig, ops
from ramnet.ops import reference
from tests.autotune.bench.tables import table

TINY = scan.Sizes(batch=2, heads=2, tokens=9, top_k=3, order=2, sub_dim=3, dim=4)


class Kernels:
    """Stand for the kernels, which would take seconds a call interpreted: the reference's numbers, and what was called.

    ``off`` is what the first number of a scan's output and of a step's is off by, as a part of it.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.off = 0.0

    def __getattr__(self, op: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[op] += 1
            found = getattr(reference, op)(*arguments)
            if op in ("memory_scan", "memory_step"):
                (found if op == "memory_step" else found[0]).mul_(1 + self.off)
            return found

        return call


class Compiled(torch.nn.Module):
    """In the place of ``lowering.compile``'s: a model on stand-ins."""

    def __init__(self, model: Any, use: Any) -> None:
        super().__init__()
        self.model, self.use = model, use

    def forward(self, *arguments: Any, **named: Any) -> Any:
        with self.use():
            return self.model(*arguments, **named)


@pytest.fixture
def kernels() -> dict[str, Kernels]:
    """With default and with tuned schedules."""
    found = {name: Kernels() for name in (DEFAULT, TUNED)}
    for name, each in found.items():
        ops.register_backend(f"stand-in, {name}", each)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Kernels]) -> GpuRun:
    """On the CPU."""
    run = GpuRun("h200", quick=True, device="cpu")
    run.kernels = {name: partial(ops.using, f"stand-in, {name}") for name in kernels}
    monkeypatch.setattr("autotune.measure.timing.SHORTEST_SAMPLE", 1e-6)
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
def tiny(monkeypatch: pytest.MonkeyPatch, run: GpuRun) -> None:
    """The skeletons of 340m with one layer, on the stand-ins, and no torch.compile."""
    config = RamNetConfig(
        vocab_size=11, hidden_size=32, num_layers=2, num_heads=2, value_dim=4, order=2, sub_dim=3, top_k=3,
        intermediate_size=8, cape_full_layers=1,
    )  # fmt: skip
    monkeypatch.setattr(RamNetConfig, "preset", lambda name: config)
    monkeypatch.setattr(training, "CHECKED_TOKENS", 5)
    monkeypatch.setattr(
        "lowering.compile", lambda model, target, tuned=True: Compiled(model, run.kernels[TUNED if tuned else DEFAULT])
    )
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)


def forms(table: Table) -> set[str]:
    return {row.form for row in table.rows}


def test_the_scan_is_timed_in_every_form_beside_the_floor(run: GpuRun, kernels: dict[str, Kernels]) -> None:
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


def test_the_scan_is_timed_beside_gated_linear_attention(run: GpuRun, kernels: dict[str, Kernels], fla: None) -> None:
    (table,) = scan.beside_gla(run, TINY)
    assert kernels[TUNED].calls["memory_scan_backward"] > table.rows[0].runs and not kernels[DEFAULT].calls
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
    (decoded,) = decode_step.steps(run, batch=1, capture=lambda call: call)
    assert decoded.failed == {decode_step.GLA: NO_FLA, decode_step.DELTA: NO_FLA}
    (trained,) = training.step(run, batch=2, tokens=8)
    assert trained.failed == {training.GLA: NO_FLA} and forms(trained) == {TUNED}


def test_what_the_library_itself_lacks_is_said() -> None:
    lacking = ModuleNotFoundError("No module named 'einops'", name="einops")
    assert str(without_fla(lacking)) == "flash-linear-attention cannot be imported: No module named 'einops'"
    assert str(without_fla(ModuleNotFoundError("No module named 'fla'", name="fla.ops"))) == NO_FLA


def test_a_form_with_wrong_numbers_is_not_timed(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = scan.eager_scan_gradients.ScanChunked.apply
    monkeypatch.setattr(scan.eager_scan_gradients, "scan_sorted", lambda *x: tuple(2 * y for y in doubled(*x)))
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


def test_the_scan_is_compared_with_attention_by_length(run: GpuRun, kernels: dict[str, Kernels]) -> None:
    tables = scan.lengths(run, TINY, tokens=(4, 6))
    assert kernels[TUNED].calls["memory_scan_backward"] > sum(table.rows[0].runs for table in tables)
    assert [x.name for x in tables] == ["scan and attention, T = 4", "scan and attention, T = 6"]
    assert all(forms(x) == {TUNED, scan.FLASH, scan.CUDNN} for x in tables)


def test_decoding_compares_models_of_one_skeleton(
    run: GpuRun, kernels: dict[str, Kernels], fla: None, tiny: None
) -> None:
    captures = itertools.count()
    run.quick = False
    (table,) = decode_step.steps(run, batch=3, capture=lambda call: (next(captures), call)[1])
    assert not table.failed
    peers = {
        decode_step.GLA,
        decode_step.DELTA,
        decode_step.GLA + decode_step.COMPILED,
        decode_step.DELTA + decode_step.COMPILED,
    }
    assert forms(table) == {TUNED, DEFAULT, decode_step.AS_CALLED, *peers}
    assert kernels[TUNED].calls["memory_step"] > kernels[DEFAULT].calls["memory_step"] > table.row(DEFAULT).runs
    assert next(captures) == len(peers) + 2, "all but the call as users make it are replayed from graphs"
    assert run.facts[f"{table.name}, {TUNED}, tokens/s"] == pytest.approx(3 / table.row(TUNED).seconds)


def test_the_states_of_340m_and_its_peers_are_stated() -> None:
    """RAM-Net's 28.75 M are the paper's; the peers' are those of 27 layers, which the paper has fewer of."""
    stated = decode_step._states(RamNetConfig.preset("340m"))
    assert stated == "float32 states of RAM-Net 28.8 M, GLA 3.5 M, Gated DeltaNet 10.6 M"


def test_decoding_late_starts_from_a_filled_state_at_a_million(
    run: GpuRun, kernels: dict[str, Kernels], tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    real = decode_step._step
    monkeypatch.setattr(
        decode_step, "_step", lambda model, state, *x: (states.append(state.clone()), real(model, state, *x))[1]
    )
    (table,) = decode_step.by_position(run, batch=1, capture=lambda call: call)
    assert forms(table) == {"at position 1,000", "at position 1,000,000"} and table.base == "at position 1,000"
    assert kernels[TUNED].calls["memory_scan"] == 2, "the tokens before are read by the kernels, in both layers"
    assert [int(state.position) for state in states] == [1_000, 1_000_000]
    assert all(bool((x != 0).all()) for x in states[1].memory)


def test_logits_that_are_not_finite_are_a_failure(
    run: GpuRun, fla: None, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = sys.modules["fla.ops.gated_delta_rule"]
    monkeypatch.setattr(rule, "fused_recurrent_gated_delta_rule", lambda q, k, v, **named: (v / 0, v))
    (table,) = decode_step.steps(run, batch=1, capture=lambda call: call)
    assert "GatedDeltaNet is wrong: its result 0 holds numbers that are not finite" in table.failed[decode_step.DELTA]

    def compiled(model: Any, target: str, tuned: bool) -> Any:
        return lambda *x, **named: model(*x, **named)._replace(logits=torch.full((1, 1, 11), torch.nan))

    monkeypatch.setattr("lowering.compile", compiled)
    (table,) = decode_step.by_position(run, batch=1, capture=lambda call: call)
    assert not table.rows
    assert "RAM-Net is wrong: its result 0 holds numbers that are not finite" in table.failed["at position 1,000"]


def test_kernels_that_decode_other_logits_are_a_failure(
    run: GpuRun, no_fla: None, tiny: None, monkeypatch: Any
) -> None:
    def twice(model: Any, target: str, tuned: bool = True) -> Any:
        def call(*x: Any, **named: Any) -> Any:
            found = model(*x, **named)
            return found._replace(logits=found.logits * (1 if tuned else 2))

        return call

    monkeypatch.setattr("lowering.compile", twice)
    (table,) = decode_step.steps(run, batch=1, capture=lambda call: call)
    assert DEFAULT not in forms(table) and TUNED in forms(table)
    assert "RAM-Net is wrong" in table.failed[DEFAULT]


def test_training_steps_are_compared_at_the_same_number_of_parts(
    run: GpuRun, kernels: dict[str, Kernels], fla: None, tiny: None
) -> None:
    (table,) = training.step(run, batch=4, tokens=8)
    assert kernels[TUNED].calls["memory_scan_backward"] > table.row(TUNED).runs and not kernels[DEFAULT].calls
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


def test_kernels_that_train_otherwise_are_a_failure(
    run: GpuRun, kernels: dict[str, Kernels], no_fla: None, tiny: None
) -> None:
    kernels[TUNED].off = 9.0
    (table,) = training.step(run, batch=2, tokens=8)
    assert not table.rows
    assert "RAM-Net is wrong: loss and norm of the gradients are" in table.failed[TUNED]


def test_a_training_step_with_another_loss_is_a_failure(run: GpuRun, fla: None, tiny: None, monkeypatch: Any) -> None:
    def other(model: Any, target: str, tuned: bool = True) -> Any:
        return torch.nn.Sequential(model.embedding, torch.nn.Linear(32, 11), Doubled())

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return (9 * x,)

    monkeypatch.setattr("lowering.compile", other)
    (table,) = training.step(run, batch=2, tokens=8)
    assert forms(table) == {training.GLA} and "compiled its loss is" in table.failed[TUNED]
