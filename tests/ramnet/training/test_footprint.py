"""What a dry run says a run needs is what it then takes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.profiler._utils import traverse_dfs

from ramnet import RamNetConfig
from ramnet.loss import IGNORED
from ramnet.training import Recipe, train
from ramnet.training.batch import Batch
from ramnet.training.flops import step_flops
from ramnet.training.footprint import Rows, checkpoint_bytes, held, one_pass, state_bytes
from ramnet.training.model import make
from ramnet.training.objective import Objective, recomputed
from ramnet.training.optimizer import adamw
from tests.ramnet.training.test_rows import SMALL, text

CPU = torch.device("cpu")
CONFIG = RamNetConfig(
    vocab_size=64, hidden_size=64, num_layers=2, num_heads=2, value_dim=8, order=2, sub_dim=2, top_k=1,
    intermediate_size=256, conv_layers=1,
)  # fmt: skip
ROWS = Rows(size=32, length=8, labels=6)


def most_allocated(precision: str, recompute: bool) -> int:
    """Return the most bytes that torch's allocator holds at a time during a forward and a backward pass.

    What is freed before anything else is allocated or freed does not count: it is the scratch of a library's operation,
    which depends on the processor.
    """
    model = make(CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(CONFIG.vocab_size, (ROWS.size, ROWS.length))
    labels = torch.where(torch.arange(ROWS.length) < ROWS.labels, ids, IGNORED)
    objective = Objective(model, precision, False)
    with recomputed(model, recompute), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        objective(Batch(ids, labels))[0].backward()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = traverse_dfs(profiled.profiler.kineto_results.experimental_event_tree())
    found = sorted((event for event in events if event.tag == _EventType.Allocation), key=lambda e: e.start_time_ns)
    moved = [(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in found]
    now, most = 0, 0
    for (place, size), following in pairwise([*moved, (0, 0)]):
        now += size
        if following != (place, -size):
            most = max(most, now)
    return most


@pytest.mark.parametrize(("precision", "recompute"), [("float32", False), ("bfloat16", True)])
def test_activations_are_what_the_allocator_holds(precision: str, recompute: bool) -> None:
    with torch.device("meta"):
        model = make(CONFIG)
    found = one_pass(model, ROWS, getattr(torch, precision), recompute, CPU)
    # The reference's own temporary tensors, and those that last for one operation, are not foreseen.
    assert found.activations == pytest.approx(most_allocated(precision, recompute), rel=0.03)


def test_operations_are_those_of_the_linear_layers_and_of_what_is_recomputed() -> None:
    model, tokens = make(CONFIG), ROWS.size * ROWS.length
    once = step_flops(model, tokens, ROWS.size * ROWS.labels)
    # The product that ends a block is not recomputed, as nothing in the block needs its result.
    recomputed_layers = ("mixer.query_key_value", "mixer.output", "ffn.gate_up")
    again = 2 * tokens * sum(b.get_submodule(n).weight.numel() for b in model.blocks for n in recomputed_layers)
    counts = [one_pass(model, ROWS, torch.float32, recompute, CPU).flops for recompute in (False, True)]
    assert counts == [once, once + again]


def test_parameters_gradients_and_moments_are_counted_exactly() -> None:
    model = make(CONFIG)
    optimizer = adamw(model, Recipe(steps=1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert held(model) == (sum(p.nbytes for p in model.parameters()), gradients, moments)


def test_a_checkpoint_is_as_large_as_foretold(tmp_path: Path) -> None:
    model, output = make(SMALL), tmp_path / "run"
    train(model, text(tmp_path / "data", "carried"), Recipe(steps=1, batch_size=3), output=output)
    rows = Rows(3, 6, 6, carried=True)
    for name, foretold in zip(("model", "training"), checkpoint_bytes(model, rows), strict=True):
        content = (output / f"{name}.safetensors").read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert len(content) - header == foretold
    assert state_bytes(model, rows) == 3 * 4 * (9 * 4 + 9 + 2 * 8) + 3 * 8
    assert state_bytes(model, rows._replace(carried=False)) == 0


def test_all_parts_of_the_logits_are_counted_though_a_few_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ramnet.loss", "ramnet.training.footprint"):
        monkeypatch.setattr(f"{module}.LOGITS_AT_ONCE", 8 * CONFIG.vocab_size)  # 24 parts
    found = []
    for parts in (24, 3):
        monkeypatch.setattr("ramnet.training.footprint.PARTS", parts)
        found.append(one_pass(make(CONFIG), ROWS, torch.float32, False, CPU))
    assert found[0].flops == found[1].flops
    assert found[1].activations == pytest.approx(found[0].activations, rel=0.02)
