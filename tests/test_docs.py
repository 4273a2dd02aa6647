"""The files and names in the documentation exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = ("ramnet", "lowering", "schedules", "autotune", "export", "tests", "docs")


def defined(path: Path) -> set[str]:
    """Functions, classes and constants of a file, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_each_stop_of_the_walk_is_there() -> None:
    text = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    stops = re.findall(r"`([\w/]+\.py)`,\s+`(\w+)`", text)
    assert len(stops) >= 10
    for path, name in stops:
        assert name in defined(ROOT / path), f"{path} has no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text))
    linked = {x for x in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in x}
    for name in named:
        assert (ROOT / name).exists(), f"{document.name} names {name}"
    for name in linked:
        assert (document.parent / name).exists(), f"{document.name} links {name}"
