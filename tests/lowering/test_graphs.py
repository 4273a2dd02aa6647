"""Tokens replayed from graphs, recorded without CUDA: buffers, keys, states, no synchronisation."""

from __future__ import annotations

import gc
import re
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from autotune.measure.eager_decode_heads import EAGER
from lowering.compiled import _CompiledModel
from lowering.model import heads_block
from lowering.model.token_graphs import TokenGraphs
from ramnet import RamNetConfig, RamNetForCausalLM, RamState, ops
from tests.lowering.recorder import NoWaiting, Recorder
from tests.samples import relative_rmse

ops.register_backend("test heads", EAGER)


def small_model(**changes: Any) -> RamNetForCausalLM:
    torch.manual_seed(0)
    config = RamNetConfig(
        vocab_size=61, hidden_size=16, num_layers=3, num_heads=2, value_dim=6, order=3, sub_dim=3, top_k=4,
        cape_full_layers=1, cape_half_layers=1, intermediate_size=24, conv_layers=1, decay_power=2.0, temperature=0.7,
    )  # fmt: skip
    return RamNetForCausalLM(RamNetConfig(**{**config.model_dump(), **changes}))


class WithHeads(RamNetForCausalLM):
    """The same model, whose single tokens in place use decode_heads."""

    def __init__(self, model: RamNetForCausalLM) -> None:
        self.__dict__.update(model.__dict__)

    def run_block(
        self, block: Any, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool, sequences: Any
    ) -> Any:
        if not in_place:
            return block(x, memory, mass, position, False, sequences)
        return heads_block.decode(block, x, memory, mass, position, "test heads"), memory, mass


def graphs_of(model: RamNetForCausalLM, record: Any, kept: int = 8) -> TokenGraphs:
    step = WithHeads(model)
    return TokenGraphs(model, lambda token, state: step(token, state, in_place=True).logits, record, kept)


@pytest.fixture
def model() -> RamNetForCausalLM:
    return small_model()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def ids(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def assert_states_match(actual: RamState, expected: RamState, tolerance: float = 1e-5) -> None:
    theirs = expected.tensors()
    for name, tensor in actual.tensors().items():
        assert relative_rmse(tensor, theirs[name]) <= tolerance, name


def test_opcheck_decode_heads(model: RamNetForCausalLM) -> None:
    state = RamState.zeros(model.config, 2)
    c = model.config.layers[0]
    width = 2 * c.num_heads * c.order * c.sub_dim + c.num_heads * c.value_dim
    arguments = (torch.randn(2, width), torch.zeros(2, c.num_heads), state.position, state.memory[0], state.mass[0],
                 c.order, c.sub_dim, c.top_k, 1, c.temperature, c.decay_power, c.eps, "test heads")  # fmt: skip
    torch.library.opcheck(torch.ops.ramnet.decode_heads.default, arguments)


@pytest.mark.parametrize("changes", [{}, {"num_heads": [8, 2, 3], "order": [2, 3, 1], "sub_dim": [4, 3, 64]}])
@torch.no_grad()
def test_blocks_that_decode_by_heads_equal_those_of_the_model(changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    step, state, right = WithHeads(model), RamState.zeros(model.config, 3), RamState.zeros(model.config, 3)
    for t in range(8):
        token = ids(3, 8)[:, t : t + 1]
        out, expected = step(token, state, in_place=True), model(token, right, in_place=True)
        assert relative_rmse(out.logits, expected.logits) < 1e-5
    assert_states_match(state, right)


@torch.no_grad()
def test_compiled_code_writes_to_the_state_itself_and_copies_none_of_it(model: RamNetForCausalLM) -> None:
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    c = model.config
    compiled = torch.compile(heads_block.decode, fullgraph=True)
    arguments = [torch.randn(2, 1, c.hidden_size), torch.rand(2, 2, 27, 6), torch.rand(2, 2, 27), torch.tensor([5, 7])]
    right = [x.clone() for x in arguments]
    expected = heads_block.decode(model.blocks[0], *right, "test heads")
    out, (code,) = run_and_get_code(compiled, model.blocks[0], *arguments, "test heads")
    assert relative_rmse(out, expected) < 1e-5
    assert all(relative_rmse(a, b) < 1e-5 for a, b in zip(arguments[1:], right[1:], strict=True))
    # log_scale, position, memory and mass must be the caller's tensors, not copies of them.
    assert re.search(r"decode_heads\.default\(buf\d+, (arg\d+_\d+, ){4}", code), code


@torch.no_grad()
def test_lengths_and_batches_share_the_graphs_of_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    counters.clear()
    model = small_model(num_layers=1, conv_layers=0, cape_half_layers=0)
    monkeypatch.setattr("lowering.compiled.interpreted", lambda: True)  # without graphs
    compiled = _CompiledModel(model, "test heads", True, (None, True, "aot_eager"))
    built = []
    for batch, length in ((2, 5), (3, 9), (4, 17)):
        out = compiled(ids(batch, length))
        compiled(ids(batch, 1), out.state, in_place=True)
        built.append(counters["stats"]["unique_graphs"])
    assert built[0] < built[1] == built[2]  # one static size, then any size


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"num_heads": [2, 1, 3], "value_dim": [6, 5, 6], "order": [3, 2, 3]}])
def test_replayed_tokens_equal_called_ones_at_every_position(changes: dict[str, Any], recorder: Recorder) -> None:
    model = small_model(**changes)
    graphs = graphs_of(model, recorder)
    state, right = model(ids(2, 5)).state, model(ids(2, 5)).state
    for t in range(6):
        token = ids(2, 6, seed=2)[:, t : t + 1]
        logits, expected = graphs(token, state), model(token, right, in_place=True).logits
        assert relative_rmse(logits, expected) < 1e-5
        assert_states_match(state, right)
    assert (recorder.recorded, recorder.replayed) == (1, 6)


@torch.no_grad()
def test_autograd_is_told_that_a_replay_changed_the_state(model: RamNetForCausalLM, recorder: Recorder) -> None:
    graphs, state = graphs_of(model, recorder), RamState.zeros(model.config, 1)
    graphs(ids(1, 1), state)
    before = {name: x._version for name, x in state.tensors().items()}
    with torch.inference_mode():
        graphs(ids(1, 1), RamState.zeros(model.config, 1))  # tensors without versions
    graphs(ids(1, 1), state)
    assert all(x._version > before[name] for name, x in state.tensors().items())


@torch.no_grad()
def test_logits_kept_from_a_token_stay_as_they_are(model: RamNetForCausalLM, recorder: Recorder) -> None:
    graphs, state = graphs_of(model, recorder), RamState.zeros(model.config, 1)
    first = graphs(ids(1, 1), state)
    kept = first.clone()
    graphs(ids(1, 1, seed=2), state)
    assert torch.equal(first, kept)


@torch.no_grad()
def test_each_state_and_batch_has_a_graph_and_the_least_recently_used_is_dropped(
    model: RamNetForCausalLM, recorder: Recorder
) -> None:
    graphs = graphs_of(model, recorder, kept=2)
    a, b, wide = (RamState.zeros(model.config, batch) for batch in (1, 1, 2))
    for state in (a, b, a, b):
        graphs(ids(1, 1), state)
    assert recorder.recorded == 2
    assert int(a.position) == int(b.position) == 2
    graphs(ids(2, 1), wide)  # a is dropped, as b was used more recently
    graphs(ids(1, 1), b)
    assert recorder.recorded == 3
    graphs(ids(1, 1), a)
    assert recorder.recorded == 4
    assert int(a.position) == int(b.position) == 3


@torch.no_grad()
def test_a_model_that_was_moved_or_converted_is_recorded_again(model: RamNetForCausalLM, recorder: Recorder) -> None:
    graphs, state = graphs_of(model, recorder), RamState.zeros(model.config, 1)
    graphs(ids(1, 1), state)
    model.to(torch.bfloat16)
    assert graphs(ids(1, 1), state).dtype == torch.bfloat16
    assert recorder.recorded == 2


def replace_weights(model: RamNetForCausalLM) -> None:
    other = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def adapt(model: RamNetForCausalLM) -> None:
    model.blocks[1].ffn.down = torch.nn.Sequential(model.blocks[1].ffn.down, torch.nn.Tanh())


def parametrise(model: RamNetForCausalLM) -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mixer.output)
    layer.parametrizations.weight.original0.data *= 2


@torch.no_grad()
@pytest.mark.parametrize("change", [replace_weights, adapt, parametrise])
def test_a_replaced_module_or_parameter_is_recorded_again(
    change: Any, model: RamNetForCausalLM, recorder: Recorder
) -> None:
    graphs, state, right = graphs_of(model, recorder), *(RamState.zeros(model.config, 1) for _ in range(2))
    for done in range(4):
        if done == 2:
            change(model)
        logits, expected = graphs(ids(1, 1), state), model(ids(1, 1), right, in_place=True).logits
        assert relative_rmse(logits, expected) < 1e-5
    assert recorder.recorded == 2


@torch.no_grad()
def test_a_model_with_hooks_does_not_use_graphs(model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graphs, on_gpu = graphs_of(model, Recorder()), SimpleNamespace(is_cuda=True)
    handle = model.blocks[1].mixer.register_forward_hook(lambda *_: None)
    assert not graphs.serve(on_gpu)  # type: ignore[arg-type]
    handle.remove()
    assert graphs.serve(on_gpu)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_graph_holds_no_reference_to_a_state(model: RamNetForCausalLM, recorder: Recorder) -> None:
    """The recorder holds no references, as a CUDA graph holds only addresses."""
    held: list[Any] = []

    def record(run: Any, rehearse: Any) -> Any:
        held.append(weakref.ref(run))
        return lambda: None, rehearse()

    graphs, state = graphs_of(model, record), RamState.zeros(model.config, 1)
    graphs(ids(1, 1), state)
    memory = weakref.ref(state.memory[0])
    del state
    gc.collect()
    assert memory() is None and held[0]() is None


@torch.no_grad()
def test_what_a_step_refuses_is_refused_before_anything_is_recorded(
    model: RamNetForCausalLM, recorder: Recorder
) -> None:
    graphs, state = graphs_of(model, recorder), RamState.zeros(model.config, 1)
    with pytest.raises(ValueError, match="in_place takes one token at a time, not 2"):
        graphs(ids(1, 2), state)
    with pytest.raises(ValueError, match=r"state.memory\[0\] has shape \[1, 2, 27, 6\]; it must be \[2, 2, 27, 6\]"):
        graphs(ids(2, 1), state)
    assert recorder.recorded == 0 and state.position.tolist() == [0]


def test_graphs_are_not_used_on_the_cpu_with_gradients_or_while_the_caller_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    recording = False
    graphs = graphs_of(small_model(), Recorder())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    with torch.no_grad():
        assert graphs.serve(on_gpu)
        assert not graphs.serve(ids(1, 1))
        recording = True
        assert not graphs.serve(on_gpu)
    recording = False
    assert not graphs.serve(on_gpu)


@torch.no_grad()
def test_generation_does_not_synchronise_between_tokens(
    model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ramnet.generation.sampled.SYNCHRONOUS", ())  # treat the CPU as a GPU
    with pytest.raises(RuntimeError, match="waits for the device"), NoWaiting():
        int(torch.ones(()))
    state = RamState.zeros(model.config, 2)
    with NoWaiting():
        model(ids(2, 1), state, in_place=True)
        model(ids(2, 7), state)

    class Guarded(RamNetForCausalLM):
        """There is no synchronisation between the check of the prompt and the last token."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            guard.__enter__() if not entered else None
            entered.append(True)
            return super().forward(*args, **kwargs)

    def check_in_the_end(taint: Tensor) -> None:
        guard.__exit__(None, None, None)
        ended.append(taint)

    guard, entered, ended = NoWaiting(), [], []
    model.__class__ = Guarded
    monkeypatch.setattr("ramnet.generation.sampled.check_finite", check_in_the_end)
    said = model.generate(ids(2, 3), 5, temperature=0.8, top_k=5, top_p=0.9, seed=0)
    assert said.shape == (2, 8) and len(entered) == 5 and len(ended) == 1
