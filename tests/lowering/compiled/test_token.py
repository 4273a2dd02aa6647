"""Tokens and short prompts that a compiled model reads through its library equal the model's own."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

import lowering
from lowering.aot import build
from lowering.aot.library import Library
from lowering.aot.weights import BLOCK
from ramnet import RamNetForCausalLM, RamState
from tests.lowering.compiled.models import CONFIG, fresh, ids
from tests.samples import relative_rmse

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(params=["whole tokens", "blocks"])
def calls(
    request: pytest.FixtureRequest, model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[int]]:
    """The calls of the library; a hook outside of the blocks makes the model call it for each block."""
    made: list[int] = []
    name = "step" if request.param == "whole tokens" else "block"
    run = getattr(Library, name)
    monkeypatch.setattr(Library, name, lambda self, *given: (made.append(1), run(self, *given))[1])
    if name == "block":
        model.head.register_forward_hook(lambda *_: None)
    yield made
    assert made, f"{name} is not called"


@torch.no_grad()
def assert_equal_steps(fast: RamNetForCausalLM, model: RamNetForCausalLM, start: torch.Tensor) -> None:
    batch = len(start)
    state, right = RamState.zeros(CONFIG, batch), RamState.zeros(CONFIG, batch)
    state.position += start
    right.position += start
    tensors = state.tensors()
    for seed in range(6):
        token = ids(batch, 1, seed)
        got = fast(token, state, in_place=True)
        assert got.state is state
        assert relative_rmse(got.logits, model(token, right, in_place=True).logits) < 1e-5
    for name, tensor in state.tensors().items():
        assert tensor is tensors[name]
        assert relative_rmse(tensor, right.tensors()[name]) < 1e-5, name


@pytest.mark.parametrize("batch", [1, 3, BLOCK])
def test_a_token_of_each_row(batch: int, calls: list[int], model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    assert_equal_steps(fast, model, torch.arange(batch))


def test_cape_is_exact_at_any_position(calls: list[int], model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    assert_equal_steps(fast, model, torch.tensor([26, 1000, 2**31 - 3, 2**40 + 5]))


def test_more_rows_are_read_by_modules(
    model: RamNetForCausalLM, fast: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Library, "step")
    monkeypatch.delattr(Library, "block")
    assert_equal_steps(fast, model, torch.arange(BLOCK + 1))


@pytest.mark.parametrize("kept", [None, 0, 1, 9])
@torch.no_grad()
def test_short_prompts(
    kept: int | None, model: RamNetForCausalLM, fast: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, run = [], Library.tokens
    monkeypatch.setattr(
        Library, "tokens", lambda self, given, *others: (read.append(len(given)), run(self, given, *others))
    )
    state = None
    for tokens in (BLOCK, 5, BLOCK + 1, 2):
        before = None if state is None else state.clone()
        got, want = (call(ids(1, tokens), state, logits_to_keep=kept) for call in (fast, model))
        assert relative_rmse(got.logits, want.logits) < 1e-5
        for name, tensor in got.state.tensors().items():
            assert relative_rmse(tensor, want.state.tensors()[name]) < 1e-5, name
            assert before is None or torch.equal(state.tensors()[name], before.tensors()[name])
        state = want.state
    assert read == [BLOCK, 5, 2]


@torch.no_grad()
def test_a_token_that_is_not_in_place_leaves_the_state(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    state = model(ids(3, 4)).state
    before = state.clone()
    got, want = (call(ids(3, 1), state) for call in (fast, model))
    assert relative_rmse(got.logits, want.logits) < 1e-5
    assert got.state.position.tolist() == [5] * 3
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name])
        assert relative_rmse(got.state.tensors()[name], want.state.tensors()[name]) < 1e-5


@torch.no_grad()
def test_an_id_outside_of_the_vocabulary_changes_no_row(fast: RamNetForCausalLM) -> None:
    state = RamState.zeros(CONFIG, BLOCK)
    token = ids(BLOCK, 1)
    for wrong in (-1, CONFIG.vocab_size, 2**32 + 1):
        token[30] = wrong
        with pytest.raises(ValueError, match=f"input_ids holds {wrong}; token ids must be in"):
            fast(token, state, in_place=True)
    assert all(float(memory.abs().sum()) == 0 for memory in state.memory)
    assert state.position.tolist() == [0] * BLOCK


def test_without_a_c_compiler_modules_are_called_and_one_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("there is no C compiler; install gcc or clang, or name one in CC")

    monkeypatch.setattr(build, "shared_library", missing)
    model = fresh()
    fast = lowering.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal_steps(fast, model, torch.zeros(2, dtype=torch.int64))
    assert [str(each.message) for each in caught if "C compiler" in str(each.message)] == [
        "tokens are computed module by module: there is no C compiler; install gcc or clang, or name one in CC"
    ]


def test_a_program_ends_in_silence_if_something_holds_a_library_to_the_end() -> None:
    """Python sets the names of modules that are held, too, to None before."""
    code = "import os, sys; from lowering.aot import library as held; os.held = held, held.Library(sys.argv[1], 2)"
    command = [sys.executable, "-c", code, str(build.shared_library(CONFIG))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


@torch.no_grad()
def test_no_rows_are_read_as_by_the_model(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    none = RamState.zeros(CONFIG, 1).reorder(torch.tensor([], dtype=torch.int64))
    assert fast(ids(0, 1), none, in_place=True).logits.shape == (0, 1, CONFIG.vocab_size)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([[1, 2]],), r"^input_ids is a list; it must be a tensor of torch\.int64"),
        ((ids(1, 1), (1, 2)), r"^state is a tuple; it must be a RamState$"),
    ],
)
@torch.no_grad()
def test_what_is_of_another_type_is_named(given: tuple, message: str, fast: RamNetForCausalLM) -> None:
    with pytest.raises(TypeError, match=message):
        fast(*given)
