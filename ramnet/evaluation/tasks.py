"""Tasks of lm-evaluation-harness, by name or from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

SEED = 1234  # of the examples in contexts; the harness's own


def load_tasks(names: Sequence[str], folder: Path | None, shots: int | None) -> dict[str, dict[str, Any]]:
    """Return tasks, groups and the groups' members as ``lm_eval.evaluate`` takes them.

    Args:
        names: names of tasks, groups or tags, or paths of YAML files.
        folder: a folder with YAML files of further tasks, or None. They replace known tasks of the same name.
        shots: examples in the context of tasks that do not fix it at 0; None is each task's own number.

    Raises:
        ValueError: if ``names`` is empty, or lm-evaluation-harness refuses a file or a task, or cannot get its data.
            The message names the file or the task.
    """
    if not names:
        raise ValueError("no task is named; give at least one")
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of tasks")
        for path in sorted(folder.rglob("*.yaml")):  # the harness leaves out files that it cannot read
            _named(str(path), partial(load_yaml, path, resolve_func=False))
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=folder)  # reads the harness's 14 000 files, in 9 s
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            own = f"nor one in {folder}" if folder else "and no file"
            raise ValueError(f"{name!r} is no task of lm-evaluation-harness, {own}")
        found = _named(f"the task {name!r}", partial(manager.load, [name]))
        for task in found["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (shots is not None and fixed != 0):
                task.set_config("num_fewshot", shots or 0)
            task.set_fewshot_seed(SEED)
        for kind, entries in loaded.items():
            entries |= found.get(kind, {})
    return loaded


def _named(name: str, call: Callable[[], Any]) -> Any:
    """Return what ``call`` does. Raises ValueError, with ``name``, for any error of lm-evaluation-harness."""
    try:
        return call()
    except Exception as error:
        problem = " ".join(str(error).split()) or "it gives no reason"
        raise ValueError(f"lm-evaluation-harness refuses {name}: {type(error).__name__}: {problem}") from error
