"""Changes of a state between steps affect the next step, or are refused before anything changes."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.onnx.session import OnnxSession
from export.onnx.state import OnnxState, OnnxTensors
from tests.export.conftest import Exported

TOLERANCE = 2e-5  # float32 sums in another order
TOKEN = torch.tensor([[7], [200]])


@pytest.fixture
def session(mixed: Exported) -> OnnxSession:
    return OnnxSession(mixed.onnx, threads=1)


@pytest.fixture
def state(session: OnnxSession) -> OnnxState:
    """A state that has taken steps, so that its arrays are bound."""
    state = session.prefill(torch.arange(10).view(2, 5)).state
    session.step(TOKEN, state)
    return state


def strided(array: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(np.asarray(array)[..., None], 2, axis=-1)[..., 0]


FORMS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "the same type": lambda x: x.copy(),
    "float64 or int32": lambda x: x.astype(np.float64 if x.dtype == np.float32 else np.int32),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "Fortran's order": lambda x: np.array(x, order="F"),
    "strided": strided,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "a list": lambda x: x.tolist(),
    "a tensor": torch.from_numpy,
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_arrays_of_any_layout_make_a_state_and_can_be_assigned(
    mixed: Exported, session: OnnxSession, state: OnnxState, form: str
) -> None:
    other = mixed.model(torch.arange(60, 80).view(2, 10)).state
    expected = mixed.model(TOKEN, other)
    given = {name: FORMS[form](array) for name, array in OnnxState.of(other).tensors.items()}
    made = OnnxState(given)
    for name, array in given.items():
        state.tensors[name] = array
    for array in given.values():  # both states have copies
        if isinstance(array, np.ndarray) and array.flags.writeable:
            array[...] = 99
    for own in (state, made):
        assert float((session.step(TOKEN, own) - expected.logits).abs().max()) < TOLERANCE
        for name, tensor in expected.state.tensors().items():
            np.testing.assert_allclose(own.tensors[name], tensor, atol=TOLERANCE, rtol=0)


def test_a_change_in_place_affects_the_next_step(session: OnnxSession, state: OnnxState) -> None:
    halved = OnnxState({name: x if name == "position" else x * 0.5 for name, x in state.tensors.items()})
    for name in state.tensors:
        if name != "position":
            state.tensors[name] *= 0.5
    assert torch.equal(session.step(TOKEN, state), session.step(TOKEN, halved))
    # As in beam search, every row continues from the first row's state.
    for array in state.tensors.values():
        array[:] = array[[0, 0]]
    logits = session.step(torch.tensor([[5], [5]]), state)
    assert torch.equal(logits[0], logits[1])


def update(tensors: OnnxTensors, name: str, value: Any) -> None:
    tensors.update({name: value})


REFUSED: dict[str, tuple[Callable[[OnnxTensors], object], str]] = {
    "another batch size": (
        lambda tensors: update(tensors, "memory.0", np.zeros((3, 3, 27, 5))),
        r"memory\.0 has shape \[2, 3, 27, 5\]; it cannot be assigned an array of \[3, 3, 27, 5\]",
    ),
    "a shape that broadcasts": (lambda tensors: update(tensors, "mass.1", np.zeros((1, 3, 27))), "cannot be assigned"),
    "a number for an array": (lambda tensors: update(tensors, "conv.0", 0.0), "cannot be assigned"),
    "one position for all rows": (lambda tensors: update(tensors, "position", np.int64(3)), "cannot be assigned"),
    "a fraction for a position": (
        lambda tensors: update(tensors, "position", np.full(2, 1.5)), "position is given float64; it holds int64",
    ),
    "complex numbers": (
        lambda tensors: update(tensors, "mass.0", np.zeros((2, 3, 27), complex)),
        r"mass\.0 is given complex128; it holds float32",
    ),
    "text": (lambda tensors: update(tensors, "mass.0", "x"), "is given <U1"),
    "another name": (lambda tensors: update(tensors, "memory.2", 0.0), r"has no 'memory\.2'; its arrays are memory\.0"),
    "removal": (lambda tensors: tensors.pop("memory.0"), r"memory\.0 cannot be removed"),
    "clearing": (lambda tensors: tensors.clear(), "cannot be removed"),
    "another size in place": (lambda tensors: tensors["mass.0"].resize(7), "cannot resize"),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_an_invalid_assignment_is_refused_and_changes_nothing(
    session: OnnxSession, state: OnnxState, change: str
) -> None:
    act, problem = REFUSED[change]
    before = state.clone()
    with pytest.raises((ValueError, TypeError), match=problem) as caught:
        act(state.tensors)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(session.step(TOKEN, state), session.step(TOKEN, before))


def test_all_arrays_at_once_are_not_replaced(state: OnnxState) -> None:
    with pytest.raises(AttributeError, match="'tensors'"):
        state.tensors = {}  # type: ignore[assignment, misc]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, for these assignments
def test_changing_the_shape_or_dtype_of_a_view_does_not_change_the_state(
    session: OnnxSession, state: OnnxState
) -> None:
    before = state.clone()
    array = state.tensors["memory.0"]
    array.shape = (array.size,)
    array.dtype = np.dtype(np.int32)
    array.flags.writeable = False
    assert torch.equal(session.step(TOKEN, state), session.step(TOKEN, before))


@pytest.mark.parametrize(
    "make",
    [OnnxState.clone, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state)),
     lambda state: OnnxState(state.tensors), lambda state: OnnxState(dict(state.tensors))],
    ids=["clone", "deepcopy", "pickle", "tensors", "the same arrays"],
)  # fmt: skip
def test_two_states_share_no_memory(
    session: OnnxSession, state: OnnxState, make: Callable[[OnnxState], OnnxState]
) -> None:
    other = make(state)
    before = {name: array.copy() for name, array in state.tensors.items()}
    first = session.step(TOKEN, other)
    for name, array in state.tensors.items():
        np.testing.assert_array_equal(array, before[name])
    assert torch.equal(session.step(TOKEN, state), first)


def test_a_state_goes_from_one_session_to_another(mixed: Exported, session: OnnxSession, state: OnnxState) -> None:
    alone = state.clone()
    expected = [session.step(TOKEN, alone) for _ in range(4)]
    other = OnnxSession(mixed.onnx, threads=1)
    assert all(torch.equal((session, other)[i % 2].step(TOKEN, state), expected[i]) for i in range(4))


def test_a_state_that_is_dropped_is_freed_and_its_arrays_live_as_long_as_a_view(session: OnnxSession) -> None:
    state = session.prefill(torch.arange(10).view(2, 5)).state
    session.step(TOKEN, state)
    view, before = state.tensors["memory.0"], state.tensors["memory.0"].copy()
    dropped = weakref.ref(state)
    del state
    assert dropped() is None
    assert len(session.model._steps) == 0
    np.testing.assert_array_equal(view, before)


def test_a_state_of_another_model_is_refused(session: OnnxSession, state: OnnxState) -> None:
    arrays = dict(state.tensors)
    for call in (session.step, session.prefill):
        with pytest.raises(ValueError, match=r"state holds memory\.2, which this model does not have"):
            call(TOKEN, OnnxState(arrays | {"memory.2": arrays["memory.1"]}))
        with pytest.raises(ValueError, match=r"state mass\.1 has shape None; here it must be \[2, 2, 36\]"):
            call(TOKEN, OnnxState({name: x for name, x in arrays.items() if name != "mass.1"}))
        with pytest.raises(ValueError, match=r"state position has shape \[\]; here it must be \[2\]"):
            call(TOKEN, OnnxState(arrays | {"position": np.int64(3)}))


@pytest.mark.parametrize("position", [-1, 2**62 + 1])
def test_a_position_that_no_state_is_at_is_refused(session: OnnxSession, state: OnnxState, position: int) -> None:
    state.tensors["position"] = [5, position]
    before = state.clone()
    for call in (session.step, session.prefill):
        with pytest.raises(ValueError, match=rf"state position holds {position}; it must be in 0\.\.2\^62"):
            call(TOKEN, state)
    for name, array in state.tensors.items():
        np.testing.assert_array_equal(array, before.tensors[name])


def test_threads_that_step_states_of_their_own_get_what_each_gets_alone(session: OnnxSession) -> None:
    prompts = torch.randint(256, (8, 1, 40), generator=torch.Generator().manual_seed(5))

    def decode(prompt: torch.Tensor) -> torch.Tensor:
        state = OnnxState.zeros(session.config, 1)
        return torch.cat([session.step(token, state) for token in prompt.split(1, dim=1)], dim=1)

    expected = [decode(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        for found, right in zip(threads.map(decode, prompts), expected, strict=True):
            assert torch.equal(found, right)


def test_threads_that_step_one_state_do_so_one_after_another(session: OnnxSession, state: OnnxState) -> None:
    alone, position = state.clone(), state.tensors["position"].copy()
    for _ in range(200):
        session.step(TOKEN, alone)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: session.step(TOKEN, state), range(200)))
    np.testing.assert_array_equal(state.tensors["position"], position + 200)
    for name, array in state.tensors.items():
        np.testing.assert_array_equal(array, alone.tensors[name])
