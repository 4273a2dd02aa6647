"""The modules of ``ramnet`` import one another in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import ramnet

ROOT = Path(ramnet.__file__).parent
MODULES = {
    ".".join(["ramnet", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Modules of ``ramnet`` that a file imports, including within functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found & MODULES.keys()


def test_there_is_no_cycle() -> None:
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert "ramnet.generation" in graph["ramnet.model"]
    TopologicalSorter(graph).prepare()  # CycleError names the cycle
