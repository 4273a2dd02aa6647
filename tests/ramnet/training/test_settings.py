"""Options from a file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ramnet.training import Recipe, Result
from ramnet.training.checkpoint import Progress
from ramnet.training.settings import Settings, read
from ramnet.training.text import Text

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Text, Recipe, dict]]:
    """What the command asks to be trained, without training it."""
    found: list[tuple[Text, Recipe, dict]] = []

    def train(_model: object, task: Text, recipe: Recipe, **options: object) -> Result:
        found.append((task, recipe, options))
        return Result()

    monkeypatch.setattr("ramnet.training.loop.train", train)
    return found


def test_the_file_gives_the_defaults_and_options_override_it(
    tmp_path: Path, asked: list, command_line: Callable[..., int]
) -> None:
    (page := tmp_path / "page.txt").write_text("the quick brown fox\n" * 20)
    (file := tmp_path / "run.toml").write_text(
        f'data = ["{page}"]\noutput = "{tmp_path}/run"\nsteps = 7\nbatch_size = 3\nlength = 9\ncarry = true\n'
        'precision = "bfloat16"\nmicro_batch = 2\n'
    )
    for more in ((), ("--steps", "5", "--packed")):
        assert command_line("train", "text", "--config", file, "--kernels", "reference", *more) == 0
    (task, recipe, options), (other_task, other_recipe, _) = asked
    assert (task.files, task.length, task.windows) == ([str(page)], 9, "carried")
    assert (recipe.steps, recipe.batch_size, recipe.precision) == (7, 3, "bfloat16")
    assert options["execution"].micro_batch == 2 and options["output"] == tmp_path / "run"
    assert (other_recipe.steps, other_recipe.batch_size, other_task.windows) == (5, 3, "packed")


def test_a_resumed_run_takes_what_the_file_says_now(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (page := tmp_path / "page.txt").write_text("the quick brown fox\n" * 20)
    file = tmp_path / "run.toml"
    run = ("train", "text", "--config", file, "--kernels", "reference")

    def write(steps: int, length: int) -> None:
        file.write_text(
            f'data = ["{page}"]\noutput = "{tmp_path}/run"\nsteps = {steps}\nbatch_size = 1\nlength = {length}\n'
        )

    write(1, 8)
    assert command_line(*run) == 0
    write(3, 8)
    assert command_line(*run, "--resume") == 0
    assert "after 3 steps" in capsys.readouterr().out
    write(3, 9)
    assert command_line(*run, "--resume") == 1
    assert "length" in capsys.readouterr().err


def test_the_command_line_overrides_the_kind_of_rows_and_takes_one(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "run.toml").write_text("packed = true\nsteps = 1\nbatch_size = 2\nlength = 8\n")
    (tmp_path / "a.txt").write_text("some text " * 9)
    run = ("train", "text", "--config", file, "--data", tmp_path / "a.txt", "--kernels", "reference")
    for more, windows in (((), "packed"), (("--carry",), "carried")):
        assert command_line(*run, "--output", tmp_path / windows, *more) == 0
        assert Progress.load(tmp_path / windows).task["windows"] == windows
        assert command_line("train", "text", "--resume", "--steps", "2", "--output", tmp_path / windows) == 0
    capsys.readouterr()
    assert command_line(*run, "--packed", "--carry", "--output", tmp_path / "none") == 2
    assert "--packed and --carry are both given; rows are of one kind" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_every_setting_is_an_option() -> None:
    from ramnet.training.cli import text

    names = {parameter.name for parameter in text.params}
    assert Settings.model_fields.keys() <= names


def test_the_papers_recipe_has_the_papers_tokens() -> None:
    found = read(CONFIGS / "340m.toml")
    tokens = found["batch_size"] * found["length"]
    assert found["steps"] * tokens == pytest.approx(10e9, rel=1e-4)
    assert found["warmup_steps"] * tokens == pytest.approx(500e6, rel=1e-3)
    assert found["batch_size"] % (8 * found["micro_batch"]) == 0
    assert (found["learning_rate"], found["final_learning_rate"], found["weight_decay"]) == (1e-3, 1e-4, 0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps = ", "is not a TOML file: "),
        ("stepps = 3", "stepps = 3: Extra inputs are not permitted"),
        ('steps = "3"', "steps = '3': Input should be a valid integer"),
        ("packed = true\ncarry = true", "packed and carry are both true"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (file := tmp_path / "run.toml").write_text(content)
    assert command_line("train", "text", "--config", file) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ramnet: {file}") and message in said and said.count("\n") == 1
