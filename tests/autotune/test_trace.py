"""The calls of a user's program are traced on any backend."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autotune.study import tuner
from autotune.trace import trace
from tests.autotune.conftest import Command

PROGRAM = """
import sys
import torch
from beside import SLOTS
from ramnet import RamNetConfig, RamNetForCausalLM

assert __name__ == "__main__" and sys.argv[1:] == []
torch.manual_seed(0)
config = RamNetConfig(
    vocab_size=8, hidden_size=8, num_layers=2, num_heads=2, value_dim=4, order=2, sub_dim=SLOTS, top_k=2
)
model = RamNetForCausalLM(config)
model(torch.randint(0, 8, (3, 5))).logits.mean().backward()
model.generate(torch.randint(0, 8, (1, 4)), max_new_tokens=3)
sys.exit(0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("SLOTS = 2\n")
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_each_workload_is_noted_with_its_calls(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    before = sys.argv, sys.path
    workloads, calls = trace(script, "cpu")
    assert (sys.argv, sys.path) == before
    found = {workload.name: workload for workload in workloads}
    assert calls.keys() == found.keys()
    training = next(w for w in workloads if w.op == "memory_scan" and w.shape["T"] == 5)
    assert training.shape == {"N": 6, "T": 5, "K": 2, "M": 4, "D": 4}
    assert (training.dtype, {*training.constants}, calls[training.name]) == ("float32", {"decay_power", "eps"}, 2)
    backward = next(w for w in workloads if w.op == "memory_scan_backward")
    assert backward.shape == training.shape and calls[backward.name] == 2
    step = next(w for w in workloads if w.op == "memory_step")
    assert step.shape == {"N": 2, "K": 2, "M": 4, "D": 4}
    assert calls[step.name] == 2 * 2, "two tokens after the one that the prompt gives, in two layers"
    rows = {w.shape["R"] for w in workloads if w.op == "address_decode"}
    assert 2 * 3 * 2 * 5 in rows and any(w.op == "address_decode_backward" for w in workloads)


COMPILED = """
import torch, ramnet
config = ramnet.RamNetConfig(
    vocab_size=8, hidden_size=8, num_layers=2, num_heads=2, value_dim=4, order=2, sub_dim=2, top_k=2
)
model = ramnet.compile(ramnet.RamNetForCausalLM(config), {target!r}, backend="aot_eager")
model.generate(torch.randint(0, 8, (1, 40)), max_new_tokens=3)
model(torch.randint(0, 8, (1, 19)), cu_seqlens=torch.tensor([0, 13, 15, 19]))
"""


@pytest.mark.parametrize(("target", "needed"), [("cpu", "tvm"), ("a100", "triton")])
def test_a_compiled_models_prefill_tokens_and_documents_are_noted(tmp_path: Path, target: str, needed: str) -> None:
    pytest.importorskip(needed)
    path = tmp_path / "compiled.py"
    path.write_text(COMPILED.format(target=target))
    workloads, calls = trace(path, target)
    scans = {(w.shape["N"], w.shape["T"]): calls[w.name] for w in workloads if w.op == "memory_scan"}
    assert scans == {(2, 40): 2, (4, 13): 2, (2, 2): 2}, "a prompt, and two groups of documents"
    tokens = [(w.shape, calls[w.name]) for w in workloads if w.op == "decode_heads"]
    shape = {"N": 2, "U": 2, "P": 2, "K": 2, "M": 4, "D": 4}
    assert tokens == ([] if target == "cpu" else [(shape, 2 * 2)]), "two tokens, in two layers"


def test_a_type_is_that_of_the_targets_kernels(tmp_path: Path) -> None:
    path = tmp_path / "narrow.py"
    call = "ramnet.ops.address_decode(torch.zeros(7, 2, 3, dtype=torch.bfloat16), 2)"
    path.write_text(f"import torch, ramnet.ops\n{call}\n")
    for target, dtype in (("cpu", "float32"), ("a100", "bfloat16")):
        (workload,), _ = trace(path, target)
        assert (workload.shape, workload.dtype) == ({"R": 7, "U": 2, "P": 3, "K": 2}, dtype)


def test_a_program_may_change_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "moves.py"
    calls = f"os.chdir({str(tmp_path)!r})\nramnet.ops.address_decode(torch.zeros(7, 2, 3), 2)"
    path.write_text(f"import os, torch, ramnet.ops\n{calls}\n")
    before = Path.cwd()
    trace(path, "cpu")
    assert Path.cwd() == before


def test_a_program_without_ops_is_refused_and_its_own_errors_pass(tmp_path: Path) -> None:
    path = tmp_path / "idle.py"
    path.write_text("import torch\ntorch.zeros(3) + 1\n")
    with pytest.raises(ValueError, match=r"idle\.py calls none of the ops address_decode, "):
        trace(path, "cpu")
    path.write_text("raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        trace(path, "cpu")


def test_what_a_program_calls_is_tuned_as_often_as_it_calls_it(
    ramnet: Command, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
    pytest.importorskip("tvm", reason="tuning for the CPU needs tvm: pip install 'ramnet[tvm]'")
    asked: list[tuple[list[str], dict[str, int]]] = []
    monkeypatch.setattr(
        tuner, "tune", lambda target, wanted, *_, calls, **__: asked.append(([w.op for w in wanted], calls)) or []
    )
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    status, out, _ = ramnet("--trace", script, "--op", "memory_step")
    assert status == 1 and "memory_step N=2 K=2 M=4 D=4 float32" in out, "which has no result"
    ((wanted, calls),) = asked
    assert wanted == ["memory_step"]
    assert max(calls.values()) == 4
    assert ramnet("--trace", script, "--length", "8")[0] == 2
    assert len(asked) == 1
