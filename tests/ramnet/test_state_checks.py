"""RamState.check refuses a state that does not fit, before anything is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from tests.ramnet.states import CONFIG, check, equal, random_state


def test_every_tensor_of_a_state_is_checked() -> None:
    check(random_state())
    check(random_state(), in_place=True)
    for name, tensor in random_state().tensors().items():
        kind, _, index = name.partition(".")
        shown = f"state.{kind}[{index}]" if index else "state.position"
        for changed, error, message in (
            (tensor.unsqueeze(-1), ValueError, f"{shown} has shape {[*tensor.shape, 1]}; it must be {[*tensor.shape]}"),
            (tensor.to("meta"), ValueError, f"{shown} is on meta but input_ids is on cpu"),
            (tensor > 0, TypeError, f"{shown} is torch.bool; it must be"),
        ):
            state = random_state()
            if index:
                getattr(state, kind)[int(index)] = changed
            else:
                state.position = changed
            with pytest.raises(error, match=re.escape(message)):
                check(state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.position[1:2].fill_(-3), ValueError, "state.position holds -3; it must be in 0..2^62"),
        (lambda s: s.position[1:2].fill_(2**62 + 1), ValueError,
         "state.position holds 4611686018427387905; it must be in 0..2^62"),
        (lambda s: setattr(s, "position", torch.full((3,), 2**30 + 1, dtype=torch.int32)), ValueError,
         "state.position holds 1073741825; it must be in 0..2^30"),
        (lambda s: setattr(s, "position", torch.tensor(2)), ValueError,
         "state.position has shape []; it must be [3]"),
        (lambda s: setattr(s, "position", torch.zeros(3)), TypeError,
         "state.position is torch.float32; it must be torch.int64"),
        (lambda s: s.mass.__setitem__(1, s.mass[1].double()), TypeError,
         "state.mass[1] is torch.float64 but state.memory[1] is torch.float32; use one type"),
        (lambda s: s.conv.pop(), ValueError, "state.conv has 0 layers; this model has 1"),
    ],
)  # fmt: skip
def test_an_invalid_state_is_refused(change: Any, error: type[Exception], message: str) -> None:
    state = random_state()
    change(state)
    with pytest.raises(error, match=re.escape(message)):
        check(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.memory.__setitem__(1, s.memory[1].mT.contiguous().mT),
         "state.memory[1] has strides [128, 64, 1, 16]; only a contiguous state is updated in place"),
        (lambda s: s.conv.__setitem__(0, s.conv[0][:1].expand(3, -1, -1)),
         "state.conv[0] has strides [0, 6, 1]; only a contiguous state is updated in place"),
        (lambda s: s.mass[0].requires_grad_(), "state.mass[0] requires gradients"),
    ],
)  # fmt: skip
def test_what_cannot_be_updated_in_place_is_refused_only_in_place(change: Any, message: str) -> None:
    state = random_state()
    change(state)
    check(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(state, in_place=True)


@torch.no_grad()
def test_a_state_that_requires_gradients_is_updated_while_gradients_are_disabled() -> None:
    state = random_state()
    state.mass[0].requires_grad_()
    check(state, in_place=True)


def test_a_state_of_inference_mode_is_updated_only_in_inference_mode() -> None:
    with torch.inference_mode():
        state = random_state()
        check(state, in_place=True)
    check(state)
    with pytest.raises(ValueError, match=re.escape("state.memory[0] was made in torch.inference_mode() and cannot be")):
        check(state, in_place=True)
    check(state.clone(), in_place=True)


def test_a_position_that_cannot_be_read_is_not_checked() -> None:
    RamState.zeros(CONFIG, 3, device="meta").check(CONFIG, 3, torch.device("meta"))


@torch.no_grad()
@pytest.mark.parametrize("layer", ["memory", "mass", "conv"])
def test_a_refused_step_changes_nothing(layer: str) -> None:
    """The last tensor of its kind does not fit, so that the tensors before it would have been written already."""
    model, state = RamNetForCausalLM(CONFIG), random_state()
    getattr(state, layer)[-1] = getattr(state, layer)[-1].mT.contiguous().mT
    before = state.clone()
    with pytest.raises(ValueError, match="only a contiguous state"):
        model(torch.zeros(3, 1, dtype=torch.int64), state, in_place=True)
    assert equal(state, before)


@pytest.mark.parametrize("name", ["memory", "mass", "conv"])
def test_layers_that_share_a_tensor_are_refused_only_in_place(name: str) -> None:
    config = RamNetConfig.preset("tiny", conv_layers=2)
    model, state = RamNetForCausalLM(config), RamState.zeros(config, 2)
    setattr(state, name, [getattr(state, name)[0]] * 2)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        model(ids, state)
        with pytest.raises(ValueError, match=rf"^state\.{name}\[1\] and state\.{name}\[0\] overlap in memory"):
            model(ids, state, in_place=True)


def test_tensors_that_overlap_are_refused_in_place() -> None:
    config = RamNetConfig.preset("tiny", conv_layers=2)
    model, ids = RamNetForCausalLM(config), torch.zeros(2, 1, dtype=torch.int64)
    shifted, within = RamState.zeros(config, 2), RamState.zeros(config, 2)
    both = torch.zeros(shifted.memory[0].numel() + 8)
    shifted.memory = [both[i : i + x.numel()].view(x.shape) for i, x in zip((0, 8), shifted.memory, strict=True)]
    mass = within.mass[1]
    within.mass[1] = within.memory[0].flatten()[16 : 16 + mass.numel()].view(mass.shape)
    for state, names in (
        (shifted, r"state\.memory\[1\] and state\.memory\[0\]"),
        (within, r"state\.mass\[1\] and state\.memory\[0\]"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=f"^{names} overlap in memory"):
            model(ids, state, in_place=True)
    assert (shifted.memory[0] == 0).all()


def test_what_is_not_a_state_is_named() -> None:
    model = RamNetForCausalLM(CONFIG)
    with pytest.raises(TypeError, match=r"^state is a int; it must be a RamState$"):
        model(torch.zeros(1, 1, dtype=torch.int64), 5)
    with pytest.raises(TypeError, match=r"^states\[1\] is a NoneType; it must be a RamState$"):
        RamState.merge([random_state(), None])
    with pytest.raises(TypeError, match=r"^index is a list; it must be a tensor of torch\.int64$"):
        random_state().reorder([0])
    with pytest.raises(
        TypeError, match=r"^layers is a RamNetForCausalLM; it must be a RamNetConfig, or a list of RamL"
    ):
        RamState.zeros(model, 2)
    for row in (-1, 3):
        with pytest.raises(ValueError, match=rf"^index holds {row}; the rows of this state are 0\.\.2$"):
            random_state().reorder(torch.tensor([0, row]))
    assert random_state().reorder(torch.tensor([], dtype=torch.int64)).split() == []
