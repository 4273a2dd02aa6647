"""``ramnet train`` as a user types it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.training import Recipe, Result, train
from ramnet.training.checkpoint import Progress, alone
from ramnet.training.objective import Execution
from tests.ramnet.training.runs import TASK, fresh

Command = Callable[..., tuple[int, str, str]]
TINY_TEXT = ("--length", "8", "--batch-size", "2", "--kernels", "reference")


@pytest.fixture
def ramnet(command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `ramnet train` in this process and return its exit status, stdout and stderr."""
    return lambda *arguments: (command_line("train", *arguments), *capsys.readouterr())


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return file


def test_text_is_trained_and_resumed(ramnet: Command, tmp_path: Path, page: Path, kept_memory: list[bool]) -> None:
    output = tmp_path / "run"
    status, out, err = ramnet("text", "--data", page, "--steps", "2", "--output", output, *TINY_TEXT)
    assert (status, err) == (0, "")
    assert re.search(r"bits per byte \d\.\d+ after 2 steps", out)
    assert kept_memory == [True]
    # What the run was comes from its checkpoint: neither --data nor --length is needed again.
    status, out, err = ramnet("text", "--output", output, "--resume", "--kernels", "reference")
    assert (status, err) == (0, "")
    assert re.search(r"bits per byte \d\.\d+ after 2 steps", out)


def test_a_finished_run_goes_on_with_more_steps_or_seconds(ramnet: Command, tmp_path: Path, page: Path) -> None:
    run = ("--output", tmp_path / "run", "--kernels", "reference")
    assert ramnet("text", "--data", page, "--steps", "2", *TINY_TEXT, *run)[0] == 0
    for budget in (("--steps", "4"), ()):
        status, out, err = ramnet("text", "--resume", *budget, *run)
        assert (status, err) == (0, "")
        assert "after 4 steps" in out
    assert "steps is 3 but the run in" in ramnet("text", "--resume", "--steps", "3", *run)[2]


def test_a_given_budget_replaces_the_other(
    ramnet: Command, tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("--output", tmp_path / "run", "--kernels", "reference")
    ramnet("text", "--data", page, "--steps", "2", *TINY_TEXT, *run)
    asked: list[Recipe] = []

    def train(_model: object, _task: object, recipe: Recipe, **_: object) -> Result:
        asked.append(recipe)
        return Result()

    monkeypatch.setattr("ramnet.training.loop.train", train)
    ramnet("text", "--resume", "--seconds", "9", *run)
    ramnet("text", "--resume", "--steps", "4", *run)
    ramnet("text", "--resume", *run)
    assert [(recipe.steps, recipe.seconds) for recipe in asked] == [(None, 9.0), (4, None), (2, None)]
    assert {recipe.batch_size for recipe in asked} == {2}


@pytest.mark.parametrize("written_by", ["save_pretrained", "training"])
def test_a_new_run_starts_from_weights(ramnet: Command, tmp_path: Path, page: Path, written_by: str) -> None:
    start, output = tmp_path / "start", tmp_path / "run"
    if written_by == "training":
        ramnet("text", "--data", page, "--steps", "2", "--output", start, *TINY_TEXT)
    else:
        small = RamNetConfig.preset("tiny", hidden_size=16, intermediate_size=0, norm_eps=0.25)
        RamNetForCausalLM(small).to(torch.bfloat16).save_pretrained(start)
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    first = RamNetForCausalLM.from_pretrained(start)
    # With a learning rate too small to change a weight, the written weights are those it started from.
    still = ("--learning-rate", "1e-30", "--steps", "1")
    status, out, err = ramnet("text", "--data", page, "--from", start, "--output", output, *still, *TINY_TEXT)
    assert (status, err) == (0, "")
    assert "after 1 steps" in out
    warned = "torch.bfloat16, where small updates are lost" in " ".join(out.split())
    assert warned == (written_by == "save_pretrained")
    after = RamNetForCausalLM.from_pretrained(output)
    assert after.config == first.config
    for name, weights in first.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weights, rtol=0, atol=1e-20)
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before
    # From then on it is a run like any other.
    status, out, _ = ramnet("text", "--resume", "--steps", "3", "--output", output, "--kernels", "reference")
    assert status == 0 and "after 3 steps" in out
    assert RamNetForCausalLM.from_pretrained(output).embedding.weight.dtype == first.embedding.weight.dtype


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (("--preset", "tiny"), "--from uses the configuration of its checkpoint; omit --preset"),
        (("--resume",), "--from starts a new run and --resume continues one; give only one of them"),
        (("--output", "start"), "the new run would replace start, which it starts from; choose another --output"),
        (("--output", "x/../start"), "the new run would replace start, which it starts from"),
    ],
)
def test_options_that_from_excludes_are_named(
    ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    RamNetForCausalLM(RamNetConfig.preset("tiny")).save_pretrained("start")
    before = {path.name: path.read_bytes() for path in Path("start").iterdir()}
    status, _, err = ramnet("text", "--from", "start", "--steps", "1", *beside)
    assert status == 2
    assert f"Error: {message}" in err
    assert {path.name: path.read_bytes() for path in Path("start").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_recall_is_trained_and_nothing_written_without_an_output(
    ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = ramnet("mqar", "--pairs", "1", "--length", "4", "--steps", "1", "--kernels", "reference")
    assert status == 0
    assert re.search(r"accuracy \d\.\d+ after 1 steps", out)
    assert not list(tmp_path.iterdir())


def test_skipped_steps_are_counted_in_the_last_line(ramnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = iter([float("inf"), float("nan"), 1.0])
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    status, out, _ = ramnet("mqar", "--pairs", "1", "--length", "4", "--steps", "3", "--kernels", "reference")
    assert status == 0
    assert re.search(r"accuracy \d\.\d+ after 3 steps, 2 of them skipped, \d+ s\n", out)


def test_without_tvm_the_reference_runs_with_one_notice(ramnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("tvm is not installed")

    monkeypatch.setattr("ramnet.ops.registered", missing)
    status, out, _ = ramnet("mqar", "--pairs", "1", "--length", "4", "--steps", "1")
    assert status == 0
    assert " ".join(out.split()).count("(tvm is not installed); the plain PyTorch reference runs instead") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("mqar", "--length", "63"), "ramnet: length is 63; it must be even"),
        (("mqar", "--pairs", "17"), "ramnet: length is 64; 17 pairs"),
        (("mqar", "--preset", "big"), "ramnet: preset 'big' is unknown; there are"),
        (("mqar", "--kernels", "abacus"), "ramnet: backend 'abacus' is unknown"),
        (("mqar", "--seconds", "0"), "ramnet: seconds = 0.0"),
        (("text", "--data", "missing.txt"), "ramnet: /"),
        (("text", "--data", "empty.txt"), "ramnet: the longest document of the training text holds 0 bytes"),
        (("text", "--output", "empty.txt/run"), "ramnet: empty.txt/run cannot be a folder"),
        (("text", "--from", "nothing"), "ramnet: nothing is not a checkpoint: it has no config.json"),
        (("text", "--resume", "--output", "nothing"), "ramnet: nothing holds no training to resume"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_disk_alone(
    ramnet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    status, _, err = ramnet(*arguments)
    assert status == 1
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_ctrl_c_exits_130_and_leaves_a_checkpoint_that_resumes(ramnet: Command, tmp_path: Path, page: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-c", "from ramnet.cli import main; main()", "train", "text", "--data", page]
    command += ["--steps", "100000", "--output", output, "--checkpoint-seconds", "0", *TINY_TEXT]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Restore SIGINT, which is ignored if the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert run.stdout is not None
        assert next(line for line in run.stdout if line.startswith("step     3"))
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=600)
    assert (run.returncode, errors.strip()) == (130, "ramnet: interrupted")
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "training.safetensors",
    ]
    refused = ramnet("text", "--output", output, "--resume", "--steps", "5", "--kernels", "reference")
    # The checkpoint is complete: it is read, and only the changed budget is refused.
    assert refused[2] == (
        f"ramnet: steps is 5 but the run in {output} has 100000; resume it with the same, or with more\n"
    )


def test_two_runs_do_not_train_in_one_folder(ramnet: Command, tmp_path: Path, page: Path) -> None:
    output = tmp_path / "run"
    arguments = ("text", "--data", page, "--steps", "1", "--output", output, *TINY_TEXT)
    with alone(output):
        status, _, error = ramnet(*arguments)
    assert (status, error) == (
        1, f"ramnet: {output} is in use: another process trains there; choose another\n"
    )  # fmt: skip
    assert not output.exists()
    assert ramnet(*arguments)[0] == 0
    assert not (output / ".lock").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "loss.png", "training.safetensors"])
def test_a_folder_in_place_of_a_file_is_found_before_training(
    ramnet: Command, tmp_path: Path, page: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    status, _, error = ramnet("text", "--data", page, "--steps", "1", "--output", tmp_path, *TINY_TEXT)
    assert status == 1
    assert f"{name} is a folder; it must be a file, or absent" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text", "--length", "9" * 20), f"length is {'9' * 20}; it must be in 1..2^31"),
        (("mqar", "--length", "1" + "0" * 20), f"length is 1{'0' * 20}; it must be at most 2^31"),
        (("text", "--batch-size", "9" * 20), "Input should be less than or equal to 2147483648"),
        (("text", "--steps", "1" + "0" * 400), "Input should be less than or equal to 9007199254740992"),
        (("text", "--micro-batch", "9" * 20), "is not in the range 1<=x<=2147483648"),
        (("text", "--checkpoint-seconds", "nan"), "nan is not a finite number"),
        (("text", "--checkpoint-seconds", "-1"), "-1.0 is not in the range x>=0"),
    ],
)
def test_sizes_and_times_have_limits(ramnet: Command, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, _, error = ramnet(*arguments, "--output", tmp_path / "run")
    assert status in (1, 2)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_computed_as_before_unless_it_is_said(
    ramnet: Command, tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("--output", tmp_path / "run", "--kernels", "reference")
    less = ("--micro-batch", "1", "--recompute")
    assert ramnet("text", "--data", page, "--steps", "1", *TINY_TEXT, *run, *less)[0] == 0
    asked: list[tuple[int | None, bool]] = []

    def train(*_: object, execution: Execution, **__: object) -> Result:
        asked.append((execution.micro_batch, execution.recompute))
        return Result()

    monkeypatch.setattr("ramnet.training.loop.train", train)
    for given in ((), ("--micro-batch", "2"), ("--no-recompute",)):
        assert ramnet("text", "--resume", *run, *given)[0] == 0
    assert asked == [(1, True), (2, True), (1, False)]


def test_a_run_begun_from_python_goes_on_by_the_command(ramnet: Command, tmp_path: Path) -> None:
    recipe = Recipe(steps=1, batch_size=2, beta2=0.99)
    train(fresh(), TASK, recipe, output=tmp_path / "run")
    status, out, err = ramnet(
        "mqar", "--resume", "--steps", "2", "--output", tmp_path / "run", "--kernels", "reference"
    )
    assert (status, err) == (0, "") and "after 2 steps" in out


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_found_before_training(ramnet: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    status, _, err = ramnet("mqar", "--pairs", "1", "--length", "4", "--steps", "1", "--output", tmp_path)
    assert (status, err) == (1, f"ramnet: {tmp_path / name} is a folder; it must be a file, or absent\n")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_pipe_is_refused(ramnet: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    status, _, err = ramnet("text", "--data", tmp_path / "pipe", "--steps", "1", "--output", tmp_path / "run")
    assert (status, err) == (
        1,
        f"ramnet: {tmp_path / 'pipe'} is a pipe, which can be read only once; write it to a file\n",
    )


def test_a_resumed_run_evaluates_as_often_as_before_and_names_its_folder(ramnet: Command, tmp_path: Path) -> None:
    output = tmp_path / "a:fire:b"
    run = ("mqar", "--pairs", "1", "--length", "4", "--kernels", "reference", "--output", output)
    assert ramnet(*run, "--steps", "1", "--checkpoint-seconds", "7")[0] == 0
    status, out, _ = ramnet(*run, "--steps", "2", "--resume")
    assert status == 0 and out.endswith(f"s; {output}\n")
    assert Progress.load(output).checkpoint_seconds == 7
