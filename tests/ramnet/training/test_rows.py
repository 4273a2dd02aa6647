"""Rows of several documents, and rows that go on with their state, give what each document alone gives."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.baselines import BaselineConfig, BaselineForCausalLM
from ramnet.loss import IGNORED
from ramnet.training import Recipe, train
from ramnet.training.batch import Batch
from ramnet.training.metrics import FILE, read
from ramnet.training.objective import Execution, Objective
from ramnet.training.text import Text
from ramnet.training.tokens import Tokens
from ramnet.training.windows import Carried, Packed

DOCUMENTS = (b"0123456789ABC", b"ab", b"", b"x", b"vwxyz")
SMALL = RamNetConfig(
    vocab_size=256, hidden_size=8, num_layers=1, num_heads=1, value_dim=4, order=2, sub_dim=3, top_k=2,
    cape_full_layers=1, conv_layers=1, embedding_std=1.0,
)  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def model() -> RamNetForCausalLM:
    torch.manual_seed(0)
    return RamNetForCausalLM(SMALL)


def loss_alone(document: bytes) -> float:
    ids = torch.tensor([list(document)])
    return float(model()(ids, labels=ids).loss.detach()) * (len(document) - 1)


@pytest.mark.parametrize("length", [1, 3, 8, 40])
def test_packed_rows_read_the_text_as_a_ring(length: int) -> None:
    inputs, labels, begins, _ = Packed(Tokens.of_bytes(DOCUMENTS), length).batch(3000, generator())
    ring = b"".join(DOCUMENTS)
    first = {at for at, byte in enumerate(ring) if byte in b"0axv" and ring.index(byte) == at}
    assert len(first) == 4
    counts: Counter = Counter()
    for row, wanted, new in zip(inputs.tolist(), labels.tolist(), begins.tolist(), strict=True):
        start = ring.index(row[0]) if row[0] != ord("x") else None
        if start is None:  # "x" is in two documents
            continue
        counts[start] += 1
        places = [(start + i) % len(ring) for i in range(length + 1)]
        assert row == [ring[at] for at in places[:-1]]
        assert wanted == [IGNORED if at in first else ring[at] for at in places[1:]]
        assert new == [i == 0 or at in first for i, at in enumerate(places[:-1])]
    expected = 3000 / len(ring)
    assert all(abs(count - expected) <= 5 * expected**0.5 for count in counts.values())
    assert len(counts) == len(ring) - 2


def test_the_loss_of_packed_documents_is_that_of_each_alone() -> None:
    text = [document for document in DOCUMENTS if document]
    ids = torch.tensor([list(b"".join(text))])
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[0, [0, 13, 15, 16]] = True
    labels = torch.cat([ids[:, 1:].masked_fill(begins[:, 1:], IGNORED), torch.tensor([[IGNORED]])], dim=1)
    two_rows = (each.repeat(2, 1) for each in (ids, labels, begins))
    loss, state = Objective(model(), "float32", False)(Batch(*two_rows))
    assert state is None
    assert float(loss.detach()) == pytest.approx(
        2 * sum(loss_alone(document) for document in text if len(document) > 1)
    )


def test_carried_rows_read_each_document_from_its_beginning_to_its_end() -> None:
    rows, length = Carried(Tokens.of_bytes(DOCUMENTS), 4), 4
    read_so_far = [b""] * 3
    whole: Counter = Counter()
    draw = generator()
    for _ in range(200):
        batch = rows.batch(3, draw)
        assert batch.continues is not None and rows.places is not None
        for r in range(3):
            counted = batch.labels[r] != IGNORED
            if not batch.continues[r]:
                read_so_far[r] = bytes(batch.inputs[r, :1].tolist())
            assert batch.inputs[r, 0] == read_so_far[r][-1], "the last label is the next input"
            read_so_far[r] += bytes(batch.labels[r][counted].tolist())
            assert bool((batch.inputs[r][~counted] == 0).all())
            if rows.places[r, 1] >= len(DOCUMENTS[int(rows.places[r, 0])]) - 1:
                whole[read_so_far[r]] += 1
            else:
                assert int(counted.sum()) == length
    assert whole.keys() == {b"0123456789ABC", b"ab", b"vwxyz"}
    expected = sum(whole.values()) / 3
    assert all(abs(count - expected) <= 5 * expected**0.5 for count in whole.values())


def test_a_carried_state_gives_the_loss_of_the_whole_document() -> None:
    rows = Carried(Tokens.of_bytes([DOCUMENTS[0], DOCUMENTS[4]]), 3)
    objective, state, draw = Objective(model(), "float32", False), None, generator()
    found = [0.0, 0.0]
    for step in range(12):
        batch = rows.batch(2, draw)
        assert batch.continues is not None and rows.places is not None
        losses = [objective(part, None if state is None else state.split()[r]) for r, part in enumerate(batch.split(1))]
        _, state = objective(batch, state)
        assert state is not None and not any(x.requires_grad for x in _pytree.tree_leaves(state))
        for r, (loss, _) in enumerate(losses):
            found[r] = float(loss.detach()) + (found[r] if batch.continues[r] else 0.0)
            document = (DOCUMENTS[0], DOCUMENTS[4])[int(rows.places[r, 0])]
            if rows.places[r, 1] >= len(document) - 1:
                assert found[r] == pytest.approx(loss_alone(document), rel=1e-5), step


class PowerCutError(Exception):
    """Interrupts a run."""


def text(folder: Path, windows: str) -> Text:
    folder.mkdir(exist_ok=True)
    for i in range(4):
        (folder / f"{i}.txt").write_bytes(b"%d then %d. " % (i, i + 1) * (i + 1))
    return Text(sorted(folder.iterdir()), 6, windows)  # type: ignore[arg-type]


EXECUTION = Execution(micro_batch=2, recompute=True)
RECIPE = Recipe(steps=5, batch_size=3, warmup_steps=2, weight_decay=0.1, precision="bfloat16", seed=3)


@pytest.mark.parametrize("windows", ["packed", "carried"])
def test_an_interrupted_run_equals_an_uninterrupted_one(
    tmp_path: Path, windows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, never_stopped, resumed = tmp_path / "data", model(), model()
    whole = train(never_stopped, text(data, windows), RECIPE, output=tmp_path / "whole", execution=EXECUTION)
    stopped = text(data, windows)
    draw, left = stopped.training.batch, [3]

    def batch(size: int, generator: torch.Generator) -> Batch:
        left[0] -= 1
        if left[0] < 0:
            raise PowerCutError
        return draw(size, generator)

    monkeypatch.setattr(stopped.training, "batch", batch)
    cut = {"output": tmp_path / "cut", "execution": EXECUTION}
    with pytest.raises(PowerCutError):
        train(model(), stopped, RECIPE, checkpoint_seconds=0, **cut)  # type: ignore[arg-type]
    rest = train(resumed, text(data, windows), RECIPE, resume=True, **cut)  # type: ignore[arg-type]
    assert rest.losses == whole.losses[3:]
    assert rest.metric == whole.metric
    assert all(torch.equal(x, resumed.state_dict()[name]) for name, x in never_stopped.state_dict().items())
    uncut, again = (read(tmp_path / name / FILE) for name in ("whole", "cut"))
    assert [record["loss"] for record in again] == [record["loss"] for record in uncut]


def test_after_a_skipped_step_rows_go_on_from_a_fresh_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    real = Objective.forward

    def forward(self: Objective, batch: Batch, state: object = None) -> object:
        states.append(state is not None)
        return real(self, batch, state)  # type: ignore[arg-type]

    norms = iter([1.0, float("nan"), 1.0, 1.0])
    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    recipe = RECIPE.model_copy(update={"steps": 4})
    result = train(model(), text(tmp_path / "data", "carried"), recipe)
    assert result.skipped == 1
    assert states == [False, True, False, True]


def test_damaged_places_and_states_are_named(tmp_path: Path) -> None:
    rows = Carried(Tokens.of_bytes(DOCUMENTS), 4)
    with pytest.raises(ValueError, match=r"places hold a document outside 0\.\.4"):
        rows.resume(torch.tensor([[5, 0]]))
    with pytest.raises(ValueError, match=r"places are torch.float32 \[2\]; they must be int64"):
        rows.resume(torch.zeros(2))
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    task = text(tmp_path / "data", "carried")
    train(model(), task, RECIPE, output=tmp_path / "run")
    path = tmp_path / "run" / "training.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({k: x for k, x in load_file(path).items() if k != "state.mass.0"}, path, metadata=metadata)
    with pytest.raises(
        ValueError, match=r"training\.safetensors holds no state of the model.s rows: state\.mass has 0 lay"
    ):
        train(model(), task, RECIPE, output=tmp_path / "run", resume=True)


@pytest.mark.parametrize(("windows", "kind"), [("packed", "hold several documents"), ("carried", "continue")])
def test_baselines_have_no_such_rows(tmp_path: Path, windows: str, kind: str) -> None:
    config = BaselineConfig(
        mixer="linear", vocab_size=256, hidden_size=8, num_layers=1, num_heads=1, key_dim=8, value_dim=8
    )
    with pytest.raises(ValueError, match=f"rows that {kind} need a RAM-Net, not the mixer 'linear'"):
        train(BaselineForCausalLM(config), text(tmp_path / "data", windows), RECIPE)


def test_a_second_run_on_a_task_begins_as_the_first(tmp_path: Path) -> None:
    task = text(tmp_path / "data", "carried")
    first = train(model(), task, RECIPE)
    assert train(model(), task, RECIPE).losses == first.losses
    assert train(model(), task, RECIPE.model_copy(update={"batch_size": 6})).step == RECIPE.steps


@pytest.mark.parametrize(("length", "rows"), [(64, 64), (4096, 1), (5000, 1), (3000, 1), (2048, 2)])
def test_an_evaluation_reads_as_many_tokens_at_a_time_as_its_memory_allows(length: int, rows: int) -> None:
    batch = Batch(torch.zeros(65, length, dtype=torch.int64), torch.zeros(65, length, dtype=torch.int64))
    assert [len(part.inputs) for part in batch.few_tokens()] == [rows] * (65 // rows) + [1] * (65 % rows > 0)
