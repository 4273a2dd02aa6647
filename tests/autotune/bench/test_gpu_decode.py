"""Decoding in a GPU's benchmark: models of one skeleton, early and late in a context, and what is refused."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch

from autotune.bench.gpu import decode_step, scan, training
from autotune.bench.gpu.run import NO_FLA, GpuRun, without_fla
from autotune.bench.run import DEFAULT, TUNED
from ramnet import RamNetConfig
from tests.autotune.bench.conftest import TINY, Kernels, forms


def test_a_missing_library_is_reported_in_the_table(run: GpuRun, no_fla: None, tiny: None) -> None:
    (scanned,) = scan.beside_gla(run, TINY)
    assert scanned.failed[scan.GLA] == NO_FLA and TUNED in forms(scanned)
    (decoded,) = decode_step.steps(run, batch=1, capture=lambda call: call)
    assert decoded.failed == {decode_step.GLA: NO_FLA, decode_step.DELTA: NO_FLA}
    (trained,) = training.step(run, batch=2, tokens=8)
    assert trained.failed == {training.GLA: NO_FLA} and forms(trained) == {TUNED}


def test_a_missing_dependency_of_the_library_is_named() -> None:
    lacking = ModuleNotFoundError("No module named 'einops'", name="einops")
    assert str(without_fla(lacking)) == "flash-linear-attention cannot be imported: No module named 'einops'"
    assert str(without_fla(ModuleNotFoundError("No module named 'fla'", name="fla.ops"))) == NO_FLA


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
    """RAM-Net's 28.75 M are the paper's; the peers have 27 layers here and fewer in the paper."""
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
