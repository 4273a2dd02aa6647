"""An export computes what its model does, however a sequence is split, and keeps its state in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.onnx.session import OnnxSession, run_copying
from export.onnx.state import OnnxState
from ramnet import RamState
from tests import brute_force
from tests.export.conftest import Exported

TOLERANCE = 2e-5  # float32 sums in another order


def largest_error(session_state: OnnxState, state: RamState) -> float:
    return max(
        float(np.abs(session_state.tensors[name] - tensor.numpy()).max(initial=0))
        for name, tensor in state.tensors().items()
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 7, 63])
@torch.no_grad()
def test_prefill_then_decode_equals_pytorch(exported: Exported, batch: int, tokens: int) -> None:
    session = OnnxSession(exported.onnx, threads=1)
    torch.manual_seed(tokens)
    ids = torch.randint(exported.model.config.vocab_size, (batch, tokens + 9))
    expected = exported.model(ids)
    out = session.prefill(ids[:, :tokens])
    logits = [out.logits, *(session.step(ids[:, t : t + 1], out.state) for t in range(tokens, tokens + 9))]
    assert float((torch.cat(logits, dim=1) - expected.logits).abs().max()) < TOLERANCE
    assert largest_error(out.state, expected.state) < TOLERANCE


@pytest.mark.parametrize("name", ["extremes", "wide"])
@torch.no_grad()
def test_prefill_equals_the_papers_definition(export_named: Callable[[str], Exported], name: str) -> None:
    model, onnx = export_named(name).model, export_named(name).onnx
    ids = torch.randint(model.config.vocab_size, (2, 31), generator=torch.Generator().manual_seed(1))
    expected = brute_force.language_model(model.config, model.state_dict(), ids)
    assert float((OnnxSession(onnx).prefill(ids).logits - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("position", [26, 2**31 - 4, 2**40])
@torch.no_grad()
def test_cape_is_exact_at_any_position_of_an_export(mixed: Exported, position: int) -> None:
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(2))
    state = mixed.model(ids).state
    state.position.copy_(position + 3 * torch.arange(2))
    expected = mixed.model(ids, state)
    session = OnnxSession(mixed.onnx, threads=1)
    found = session.prefill(ids[:, :6], OnnxState.of(state))
    steps = [session.step(ids[:, t : t + 1], found.state) for t in range(6, 12)]
    assert float((torch.cat([found.logits, *steps], dim=1) - expected.logits).abs().max()) < TOLERANCE
    assert found.state.tensors["position"].tolist() == [position + 12, position + 15]


def test_an_exported_model_takes_no_mask(mixed: Exported) -> None:
    session, ids = OnnxSession(mixed.onnx, threads=1), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask is given, but exported models do not support it"):
        session.generate(ids, 2, attention_mask=torch.ones_like(ids))


def test_a_bound_step_equals_a_copying_one_and_allocates_no_state(mixed: Exported) -> None:
    session = OnnxSession(mixed.onnx, threads=1)
    bound = session.prefill(torch.arange(10).view(2, 5)).state
    copied = bound.clone()
    buffers = {name: array.ctypes.data for name, array in bound.tensors.items()}
    for token in range(20):
        ids = torch.tensor([[token], [255 - token]])
        logits = session.step(ids, bound)
        output, _ = run_copying(session.graphs["decode"], ids, copied)
        copied = output.state
        assert torch.equal(logits, output.logits)
    for name, array in bound.tensors.items():
        assert array.ctypes.data == buffers[name]
        np.testing.assert_array_equal(array, copied.tensors[name])


def test_there_is_no_operator_between_the_state_and_its_scatter(exported: Exported) -> None:
    """onnxruntime writes in place if past → ScatterND → present and all other uses of past are GatherND."""
    import onnx

    nodes = onnx.load(exported.onnx / "decode.onnx", load_external_data=False).graph.node
    for layer in range(exported.model.config.num_layers):
        for name in (f"memory.{layer}", f"mass.{layer}"):
            uses = sorted(node.op_type for node in nodes if f"past_recurrent.{name}" in node.input)
            (scatter,) = (node for node in nodes if f"present_recurrent.{name}" in node.output)
            assert uses == ["GatherND", "ScatterND"]
            assert scatter.op_type == "ScatterND"
            assert scatter.input[0] == f"past_recurrent.{name}"


@pytest.mark.parametrize("name", ["mixed", "wide"])
def test_a_call_takes_any_split_and_leaves_its_state(export_named: Callable[[str], Exported], name: str) -> None:
    session = OnnxSession(export_named(name).onnx, threads=1)
    ids = torch.randint(session.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(3))
    whole = session(ids)
    first = session(ids[:, :4])
    before = first.state.clone()
    empty = session(ids[:, :0], first.state)
    second = session(ids[:, 4:], empty.state)
    assert empty.logits.shape == (1, 0, session.config.vocab_size)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole.logits, atol=TOLERANCE, rtol=0)
    for key, array in first.state.tensors.items():
        np.testing.assert_array_equal(array, before.tensors[key])


@pytest.mark.parametrize("name", ["mixed", "wide"])
@pytest.mark.parametrize(
    "sampling",
    [
        {}, {"temperature": 0.9, "top_k": 5, "seed": 7}, {"temperature": 1.0, "top_p": 0.5, "seed": 1},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.5, "seed": [3, 8]}, {"num_beams": 3},
    ],
)  # fmt: skip
def test_generate_equals_pytorch(
    export_named: Callable[[str], Exported], name: str, sampling: dict[str, float]
) -> None:
    made = export_named(name)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = OnnxSession(made.onnx).generate(prompt, 20, stop_tokens=[0], **sampling)
    assert found.tolist() == made.model.generate(prompt, 20, stop_tokens=[0], **sampling).tolist()


def test_a_list_of_prompts_is_continued_as_by_pytorch(mixed: Exported) -> None:
    session, prompts = OnnxSession(mixed.onnx), [[1, 2, 3], [4], [5, 6, 7]]
    texts = []
    for model in (session, mixed.model):
        said, states = model.generate(prompts, 5, return_state=True)
        more = model.generate([[7], [8, 9], [1]], 5, state=states)
        texts.append([text.tolist() for text in (*said, *more)])
    assert texts[0] == texts[1]
    assert session.generate([], 3) == []


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_a_turn_goes_on_from_the_last_ones_state(mixed: Exported, num_beams: int, length: int) -> None:
    session = OnnxSession(mixed.onnx, threads=1)
    said, state = session.generate(torch.tensor([[1, 2, 3]]), 5, return_state=True)
    before = state.clone()
    question = torch.tensor([[7, 8, 9]])[:, :length]
    answer = session.generate(question, 5, state=state, num_beams=num_beams)
    assert torch.equal(
        torch.cat([said, answer], 1), session.generate(torch.cat([said, question], 1), 5, num_beams=num_beams)
    )
    for key, array in state.tensors.items():
        np.testing.assert_array_equal(array, before.tensors[key])


def test_slots_are_those_that_a_token_reads_and_writes(mixed: Exported) -> None:
    ids = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(4))
    session = OnnxSession(mixed.onnx, threads=1)
    _, slots = run_copying(session.graphs["prefill"], ids, OnnxState.zeros(session.config, 2), layers=2)
    assert [list(x.shape) for x in slots] == [[2, 7, 2, 3, 4], [2, 7, 2, 2, 7]]  # [B, T, read and write, H, K]
    assert all(int(x.min()) >= 0 and int(x.max()) < c.slots for x, c in zip(slots, session.config.layers, strict=True))


def test_ids_of_32_bits_are_read(mixed: Exported) -> None:
    session, ids = OnnxSession(mixed.onnx, threads=1), torch.tensor([[3, 1, 4]])
    assert torch.equal(session(ids.int()).logits, session(ids).logits)


def test_bad_input_is_named(mixed: Exported) -> None:
    session = OnnxSession(mixed.onnx, threads=1)
    state = OnnxState.zeros(session.config, 2)
    with pytest.raises(ValueError, match=r"T >= 1"):
        session.prefill(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64 \[B, T\]"):
        session(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="one token at a time, not 2"):
        session(torch.zeros(2, 2, dtype=torch.int64), state, in_place=True)
    for call in (session.step, session.prefill):
        with pytest.raises(ValueError, match=r"memory\.0 has shape \[2, 3, 27, 5\]; here it must be \[3, 3, 27, 5\]"):
            call(torch.zeros(3, 1, dtype=torch.int64), state)
        with pytest.raises(ValueError, match=r"holds 256; token ids must be in 0\.\.255"):
            call(torch.tensor([[256], [0]]), state)
        with pytest.raises(TypeError, match="input_ids is a list; it must be a tensor of"):
            call([[0], [0]], state)
        with pytest.raises(TypeError, match="state is a RamState; it must be an OnnxState"):
            call(torch.zeros(2, 1, dtype=torch.int64), RamState.zeros(session.config, 2))
    session.step(torch.zeros(2, 1, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="has 3 rows; the state is of batch size 2"):
        session.step(torch.zeros(3, 1, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="threads is 0; it must be at least 1, or None"):
        OnnxSession(mixed.onnx, threads=0)


def test_a_state_whose_step_failed_half_way_is_refused(mixed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    session, token = OnnxSession(mixed.onnx, threads=1), torch.tensor([[3]])
    state, other = OnnxState.zeros(session.config, 1), OnnxState.zeros(session.config, 1)
    session.step(token, state)
    whole = session.graphs["decode"].run_bound

    def half(binding: Any) -> None:
        whole(binding)
        raise RuntimeError("decode.onnx failed in onnxruntime: out of memory")

    monkeypatch.setattr(session.graphs["decode"], "run_bound", half)
    with pytest.raises(RuntimeError, match="out of memory; the state is updated in part and not taken from here on"):
        session.step(token, state)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="state position holds -1"):
        session.step(token, state)
    session.step(token, other)


@pytest.mark.parametrize(
    ("input_ids", "problem"), [(np.zeros((2, 1), np.float32), "INVALID_ARGUMENT"), (np.full((2, 1), 256), "Gather")]
)
def test_what_onnxruntime_cannot_run_is_one_sentence_that_names_the_file(
    mixed: Exported, capfd: pytest.CaptureFixture[str], input_ids: NDArray[Any], problem: str
) -> None:
    session = OnnxSession(mixed.onnx, threads=1)
    feeds = {f"past_recurrent.{name}": x for name, x in OnnxState.zeros(session.config, 2).tensors.items()}
    with pytest.raises(RuntimeError, match=rf"onnx/decode\.onnx failed in onnxruntime: .*{problem}") as caught:
        session.graphs["decode"].run(["logits"], feeds | {"input_ids": input_ids})
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
