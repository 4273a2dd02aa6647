"""``ramnet eval`` on tasks from local files gives what the model's own probabilities give."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="ramnet eval needs lm-evaluation-harness: pip install 'ramnet[eval]'")

from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerFast

from ramnet import RamNetForCausalLM
from ramnet.evaluation.harness import HarnessModel, evaluate
from ramnet.hf import HFRamNetForCausalLM, byte_tokenizer, convert
from ramnet.hf.tokenizer import read_tokenizer
from tests.ramnet.test_model import small_model

ROWS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome at night"], "answer": 0},
    {"question": "That of Italy", "choices": ["Paris", "Rome"], "answer": 1},
    {"question": "Größe", "choices": ["is size", "is not", "a"], "answer": 0},
]
TEXT = 'doc_to_text: "{{question}}"'
TASKS = {
    "choice": f"""output_type: multiple_choice
{TEXT}
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]""",
    "text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]""",
    "written": f"""output_type: generate_until
{TEXT}
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]""",
}


@pytest.fixture(scope="module")
def model() -> RamNetForCausalLM:
    return small_model(vocab_size=256)


@pytest.fixture(scope="module")
def checkpoint(model: RamNetForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(model: RamNetForCausalLM) -> list[str]:
    """What the model writes after each question."""
    texts = []
    for row in ROWS:
        question = list(row["question"].encode())
        new = model.generate(torch.tensor([question]), 3)[0, len(question) :]
        texts.append(bytes(new.tolist()).decode(errors="replace"))
    return texts


@pytest.fixture
def tasks(tmp_path: Path, written: list[str]) -> Path:
    """A folder of three tasks, one for each kind of request. The last expects what the model writes, but for a row."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    expected = [{**row, "choices": [text]} for row, text in zip(ROWS, [*written[:2], "no"], strict=True)]
    (folder / "written.jsonl").write_text("\n".join(map(json.dumps, expected)))
    for name, body in TASKS.items():
        data = folder / ("written.jsonl" if name == "written" else "rows.jsonl")
        options = f"dataset_kwargs: {{data_files: {data}, cache_dir: {tmp_path / 'cache'}}}"
        head = f"task: {name}\ndataset_path: json\n{options}\ntest_split: train\n"
        (folder / f"{name}.yaml").write_text(head + body)
    return folder


def log_probability(model: RamNetForCausalLM, before: str, text: str) -> float:
    ids = torch.tensor([list((before + text).encode())])
    length = len(text.encode())
    logs = model(ids).logits.log_softmax(-1)[0, -length - 1 : -1]
    return logs.gather(1, ids[0, -length:, None]).sum().item()


def test_results_are_those_of_the_models_probabilities(model: RamNetForCausalLM, checkpoint: Path, tasks: Path) -> None:
    found = evaluate(checkpoint, list(TASKS), task_folder=tasks, batch_size=2, max_length=64)
    guesses = [max(row["choices"], key=lambda x: log_probability(model, row["question"], " " + x)) for row in ROWS]
    right = [guess == row["choices"][row["answer"]] for guess, row in zip(guesses, ROWS, strict=True)]
    assert 0 < sum(right) < 3
    assert found["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    texts = [row["question"] for row in ROWS]
    nats = -sum(log_probability(model, "\n", text) for text in texts)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"]["text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert found["results"]["written"]["exact_match,none"] == pytest.approx(2 / 3)
    assert found["n-samples"]["choice"]["effective"] == 3
    assert found["settings"]["parameters"] == sum(x.numel() for x in model.parameters())


def test_the_command_prints_a_table_and_writes_json(
    command_line: Callable[..., int], checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert(checkpoint, tmp_path / "hf")
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    path = tmp_path / "results.json"
    arguments = ["--task-folder", tasks, "--limit", 2, "--shots", 1, "--batch-size", 1, "--device", "cpu"]
    assert command_line("eval", tmp_path / "hf", "--tasks", "text, choice", *arguments, "--output", path) == 0
    found = json.loads(path.read_text())
    assert found["n-samples"]["text"] == {"original": 3, "effective": 2}
    assert found["n-shot"]["choice"] == 1
    value = found["results"]["text"]["bits_per_byte,none"]
    assert re.search(rf"text\W+1\W+2\W+bits_per_byte\W+{value:.4f}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({}, ["hellaswog"], r"'hellaswog' is no task of lm-evaluation-harness, nor one in .*tasks$"),
        ({}, [], "no task is named"),
        ({"bad.yaml": "task: [1"}, ["text"], r"lm-evaluation-harness refuses .*bad\.yaml: ParserError: "),
        ({"bad.yaml": "- 1"}, ["text"], r"refuses .*bad\.yaml: ValueError: Expected YAML dict"),
        ({"text.yaml": "task: text\noutput_type: guess"}, ["text"], "refuses the task 'text': ValueError: Got invalid"),
        ({"rows.jsonl": "{"}, ["text"], "refuses the task 'text': "),
        ({"rows.jsonl": '{"query": 1}'}, ["choice"], "refuses the task 'choice': UndefinedError: 'question' is und"),
    ],
)  # fmt: skip
def test_a_task_that_is_refused_is_named(
    change: dict, names: list[str], message: str, checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    from ramnet.evaluation import tasks as module

    # Its own tasks take 9 s to read.
    monkeypatch.setattr(
        module, "TaskManager", lambda include_path, include_defaults=True: TaskManager(None, include_path, False)
    )
    for name, text in change.items():
        (tasks / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(checkpoint, names, task_folder=tasks)
    assert "\n" not in str(caught.value)


def test_a_folder_of_tasks_that_is_missing_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a folder of tasks$"):
        evaluate(checkpoint, ["text"], task_folder=tmp_path / "nowhere")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, tasks: Path) -> None:
    small_model().save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    for path in (tmp_path / "bytes", tmp_path / "bytes" / "tokenizer.json"):
        message = f"{path} has 256 token ids, but the model in {tmp_path / 'small'} has only 11"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            evaluate(tmp_path / "small", ["text"], task_folder=tasks, tokenizer=path)
    with pytest.raises(ValueError, match=r"small holds no tokenizer\.json, and a vocabulary of 11 is not the bytes$"):
        evaluate(tmp_path / "small", ["text"], task_folder=tasks)
    (tmp_path / "bytes" / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "bytes", tmp_path / "bytes" / "tokenizer.json", tmp_path / "small", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no tokenizer: ") as caught:
            evaluate(tmp_path / "small", ["text"], task_folder=tasks, tokenizer=path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["lm_eval", "transformers"])
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(
    package: str, command_line: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from ramnet.evaluation import cli

    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == package else object())
    assert command_line("eval", "model", "--tasks", "text") == 1
    assert capsys.readouterr().err == f"Error: ramnet eval needs {package}: pip install 'ramnet[eval]'\n"


def test_an_answer_that_is_longer_than_the_window_is_a_sentence(checkpoint: Path, tasks: Path) -> None:
    with pytest.raises(ValueError, match=r"^an answer has \d+ tokens, and --max-length is 4; give a longer one$"):
        evaluate(checkpoint, ["choice"], task_folder=tasks, max_length=4)


def test_a_tokenizer_that_cannot_begin_a_text_is_refused(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer is of the package tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"ab": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no token for the begin or the end of a text, and none for a newline"):
        evaluate(checkpoint, ["choice"], task_folder=tasks, tokenizer=tmp_path / "tokenizer.json")


def test_a_tokenizer_without_special_tokens_pads_with_an_id_of_the_model(
    checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    made = byte_tokenizer().backend_tokenizer
    plain = json.loads(made.to_str()) | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    found = evaluate(checkpoint, ["written"], task_folder=tasks, tokenizer=tmp_path / "tokenizer.json", batch_size=3)
    assert found["results"]["written"]["exact_match,none"] == pytest.approx(2 / 3)


def test_a_text_does_not_end_at_what_pads(model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer has no special tokens, and its id 0 is "a"."""
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer is of the package tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "\n": 2}, merges=[]))
    made.decoder = tokenizers.decoders.Fuse()
    plain = PreTrainedTokenizerFast(tokenizer_object=made)
    asked = HarnessModel(HFRamNetForCausalLM.of(model), plain, max_length=64, batch_size=2)
    monkeypatch.setattr(asked, "_model_generate", lambda **_: torch.tensor([[1, 1, 0, 1]]))
    request = Instance("generate_until", {}, ("b", {"until": [], "max_gen_toks": 3}), 0)
    assert asked.generate_until([request]) == ["bab"]


def test_ids_of_a_tokenizer_may_have_gaps(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer is of the package tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"ab": 0, "[UNK]": 256}, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json has 257 token ids, but the model in .* has only 256$"):
        evaluate(checkpoint, ["text"], task_folder=tasks, tokenizer=tmp_path / "tokenizer.json")


def test_a_prompt_may_be_empty(checkpoint: Path, tasks: Path) -> None:
    rows = [json.loads(row) for row in (tasks / "written.jsonl").read_text().splitlines()]
    rows[1]["question"] = ""
    (tasks / "written.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for batch_size in (1, 3):
        found = evaluate(checkpoint, ["written"], task_folder=tasks, batch_size=batch_size)
        assert found["results"]["written"]["exact_match,none"] == pytest.approx(1 / 3)


def test_probabilities_of_a_half_precision_model_are_computed_in_float32(model: RamNetForCausalLM) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    asked = HarnessModel(HFRamNetForCausalLM.of(half), byte_tokenizer(), max_length=64, batch_size=2)
    answer = " at night, when the streets are empty"
    ids = torch.tensor([list(("Rome" + answer).encode())])
    logs = half(ids).logits.float().log_softmax(-1)[0, 3:-1].gather(1, ids[0, 4:, None])
    [(found, _)] = asked.loglikelihood([Instance("loglikelihood", {}, ("Rome", answer), 0)])
    assert found == pytest.approx(logs.sum().item(), rel=1e-5)


def test_a_device_that_is_not_there_and_too_many_shots_are_sentences(checkpoint: Path, tasks: Path) -> None:
    for device in ("nope", "meta:x"):
        with pytest.raises(ValueError, match=f"^the device {device} cannot be used: "):
            evaluate(checkpoint, ["choice"], task_folder=tasks, device=device)
    with pytest.raises(ValueError, match=r"^a task has fewer examples than 10 shots need; give fewer by --shots$"):
        evaluate(checkpoint, ["choice"], task_folder=tasks, shots=10)


def test_a_tokenizers_file_is_read_with_the_settings_beside_it(tmp_path: Path) -> None:
    saved = byte_tokenizer()
    saved.eos_token = saved.convert_ids_to_tokens(10)
    saved.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 256).eos_token_id == 10
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 256).eos_token_id is None
