"""CPU kernels take what the reference takes: any size, dtype, stride, alignment, number of threads and gradient mode.

Arguments and results are between inaccessible pages (``guarded``), so a kernel that accesses a byte outside them
crashes the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

import lowering
from ramnet import RamNetConfig, RamNetForCausalLM, RamState, ops
from ramnet.ops import reference
from schedules.cpu import AddressDecode
from tests.robustness.guarded import Edge, GuardedResults, guarded
from tests.samples import TOLERANCE, as_backends_take, cotangents, relative_rmse, scan_inputs, step_inputs, strided

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

EXAMPLES = 40
MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def placed(how: str, tensor: Tensor) -> Tensor:
    """Copy a tensor into memory of another kind."""
    if how in ("first", "last"):
        return guarded(tensor, how)  # type: ignore[arg-type]
    if how == "strided":
        return strided(tensor)
    if how == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor.clone()


PLACES = st.sampled_from(["first", "last", "strided", "offset", "own"])
IN_PLACE = st.sampled_from(["first", "last", "offset"])
EDGES = st.sampled_from(["first", "last"])
# Few values of what is compiled in, many of the rest: (U, P, K, dtype) and (K, M, D, dtype, γ). Some are those of
# tests/ramnet/test_ops_*.py, so that a kernel is compiled for both.
ADDRESSES = st.sampled_from([
    (5, 4, 8, torch.float32), (2, 3, 4, torch.float64), (1, 7, 7, torch.bfloat16), (3, 2, 1, torch.float16),
    (2, 3, 4, torch.float32), (5, 4, 8, torch.bfloat16),
])  # fmt: skip
MEMORIES = st.sampled_from([
    (4, 27, 24, torch.float32, 1.0), (1, 5, 7, torch.float32, 0.5), (3, 3, 1, torch.float64, 1.0),
    (8, 64, 33, torch.float32, 0.0), (4, 27, 24, torch.bfloat16, 0.5), (8, 64, 33, torch.float16, 1.0),
    (1, 5, 7, torch.bfloat16, 0.0),
])  # fmt: skip


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert relative_rmse(actual, wanted) <= 2 * TOLERANCE[dtype]


def on_kernels(threads: int, mode: str, edge: Edge, call: Callable[[], Any]) -> Any:
    torch.set_num_threads(threads)
    with ops.using("cpu"), MODES[mode](), GuardedResults(edge):
        return call()


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_address_decode_and_its_gradient(data: st.DataObject) -> None:
    order, sub_dim, top_k, dtype = data.draw(ADDRESSES)
    # The code for many rows is another. That of five sub-vectors takes seconds to compile.
    many = st.one_of(st.integers(0, 70), st.integers(AddressDecode.COLD_ROWS, 300))
    rows, threads = data.draw(many if order < 5 else st.integers(0, 70)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    logits = placed(data.draw(PLACES), 2 * torch.randn(rows, order, sub_dim, generator=generator).to(dtype))
    mode, edge = data.draw(st.sampled_from(sorted(MODES))), data.draw(EDGES)
    slots, weights = on_kernels(threads, mode, edge, lambda: ops.address_decode(logits, top_k))
    close((weights,), (reference.address_decode(logits, top_k)[1],), dtype)
    given = placed(data.draw(PLACES), torch.randn(rows, top_k, generator=generator).to(dtype))
    arguments = (given, logits, slots, weights)
    found = on_kernels(threads, mode, edge, lambda: torch.ops.ramnet.address_decode_backward(*arguments, kernels="cpu"))
    close((found,), (reference.address_decode_backward(*arguments),), dtype)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_memory_scan_and_its_gradient(data: st.DataObject) -> None:
    top_k, num_slots, dim, dtype, gamma = data.draw(MEMORIES)
    batch, heads, tokens = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 70)))
    state = torch.promote_types(dtype, torch.float32)
    inputs = scan_inputs(batch, heads, tokens, top_k, num_slots, dim, dtype=dtype, state_dtype=state)
    given = [placed(data.draw(PLACES), x) for x in cotangents(inputs)]
    arguments = [placed(data.draw(PLACES), x) for x in inputs.values()]
    mode, edge, threads = data.draw(st.sampled_from(sorted(MODES))), data.draw(EDGES), data.draw(st.integers(1, 3))
    found = on_kernels(threads, mode, edge, lambda: ops.memory_scan(*arguments, decay_power=gamma))
    close(found, reference.memory_scan(*as_backends_take(arguments), gamma, 1e-6, 0.01), dtype)
    found = on_kernels(
        threads, mode, edge,
        lambda: torch.ops.ramnet.memory_scan_backward(*given, *arguments, gamma, 1e-6, 0.01, kernels="cpu"),
    )  # fmt: skip
    expected = reference.memory_scan_backward(tuple(given), *as_backends_take(arguments), gamma, 1e-6, 0.01)
    close(found, expected, dtype)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_memory_step(data: st.DataObject) -> None:
    top_k, num_slots, dim, dtype, gamma = data.draw(MEMORIES)
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    state = torch.promote_types(dtype, torch.float32)
    inputs = step_inputs(scan_inputs(batch, heads, 1, top_k, num_slots, dim, dtype=dtype, state_dtype=state), 0)
    memory, mass = (placed(data.draw(IN_PLACE), inputs[name]) for name in ("memory", "mass"))
    expected_memory, expected_mass = memory.clone(), mass.clone()
    accesses = [placed(data.draw(PLACES), x) for x in list(inputs.values())[:5]]
    mode, edge, threads = data.draw(st.sampled_from(sorted(MODES))), data.draw(EDGES), data.draw(st.integers(1, 3))
    found = on_kernels(
        threads, mode, edge, lambda: ops.memory_step(*accesses, memory, mass, decay_power=gamma)
    )  # fmt: skip
    on_reference = as_backends_take([*accesses, expected_memory, expected_mass])
    expected = reference.memory_step(*on_reference, gamma, 1e-6)
    close((found, memory, mass), (expected, expected_memory, expected_mass), dtype)


@settings(max_examples=EXAMPLES)
@given(st.data())
@example(None)
def test_a_slot_out_of_range_is_refused_and_nothing_is_written(data: st.DataObject | None) -> None:
    def draw(strategy: Any, otherwise: Any) -> Any:
        return otherwise if data is None else data.draw(strategy)

    top_k, num_slots, dim, _, gamma = draw(MEMORIES, (4, 27, 24, torch.float32, 1.0))
    tokens, threads = draw(st.integers(1, 200), 130), draw(st.integers(1, 3), 2)
    inputs = {name: guarded(x, "last") for name, x in scan_inputs(2, 2, tokens, top_k, num_slots, dim).items()}
    which = draw(st.sampled_from(["write_slots", "read_slots"]), "read_slots")
    place = draw(st.integers(0, inputs[which].numel() - 1), inputs[which].numel() - 1)
    slot = draw(st.sampled_from([-1, num_slots, -(2**31), 2**31 - 1]), -1)
    kept = inputs[which].view(-1)[place].item()
    inputs[which].view(-1)[place] = slot
    given = cotangents(inputs)
    for call in (
        lambda: ops.memory_scan(*inputs.values(), decay_power=gamma),
        lambda: torch.ops.ramnet.memory_scan_backward(*given, *inputs.values(), gamma, 1e-6, 0.01, kernels="cpu"),
    ):
        with pytest.raises(ValueError, match=rf"^{which}\[.*\] is {slot}; slots must be in 0\.\.{num_slots - 1}$"):
            on_kernels(threads, "no_grad", "last", call)
    batch, head, token, _ = (int(i) for i in torch.unravel_index(torch.tensor(place), inputs[which].shape))
    step = step_inputs(inputs, token)
    before = {name: x.clone() for name, x in step.items()}
    with pytest.raises(ValueError, match=rf"{which}\[{batch}, {head}, .*\] is {slot}"):
        on_kernels(threads, "no_grad", "last", lambda: ops.memory_step(*step.values(), decay_power=gamma))
    assert all(torch.equal(step[name], before[name]) for name in before)
    inputs[which].view(-1)[place] = kept
    on_kernels(threads, "no_grad", "last", lambda: ops.memory_scan(*inputs.values(), decay_power=gamma))


@pytest.mark.parametrize("edge", ["first", "last"])
@pytest.mark.parametrize("intermediate_size", [0, 29])
@torch.no_grad()
def test_the_library_of_a_model_stays_within_its_arguments(intermediate_size: int, edge: Edge) -> None:
    torch.manual_seed(0)
    config = RamNetConfig(
        vocab_size=37, hidden_size=18, num_layers=2, num_heads=3, value_dim=7, order=3, sub_dim=3, top_k=4,
        cape_full_layers=1, intermediate_size=intermediate_size,
    )  # fmt: skip
    model = RamNetForCausalLM(config)
    model.load_state_dict({name: guarded(x, edge) for name, x in model.state_dict().items()}, assign=True)
    state, right = RamState.zeros(config, 3), RamState.zeros(config, 3)
    state.memory, state.mass = [guarded(x, edge) for x in state.memory], [guarded(x, edge) for x in state.mass]
    fast = lowering.compile(model)
    ids = torch.tensor([[3, 1, 36, 0], [0, 5, 5, 1], [7, 36, 2, 9]])
    for by_blocks in (False, True):
        hook = model.head.register_forward_hook(lambda *_: None) if by_blocks else None
        for token in ids.split(1, dim=1):
            with GuardedResults(edge):
                found = fast(token, state, in_place=True).logits
            assert relative_rmse(found, model(token, right, in_place=True).logits) < 1e-5
        if hook is not None:
            hook.remove()
    assert all(relative_rmse(a, b) < 1e-5 for a, b in zip(state.memory, right.memory, strict=True))
    with GuardedResults(edge):
        found = fast(ids[:1]).logits
    assert relative_rmse(found, model(ids[:1]).logits) < 1e-5
