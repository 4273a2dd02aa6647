"""Which compiler of C++ is found."""

from __future__ import annotations

import shutil

import pytest

from lowering.compilers import cxx

INSTALLED = ("g++", "clang++", "/opt/my tools/g++")


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (None, ["/bin/g++"]),
        ("", ["/bin/g++"]),
        ("clang++", ["/bin/clang++"]),
        ("clang++ -pipe", ["/bin/clang++", "-pipe"]),
        ("/opt/my tools/g++", ["/bin//opt/my tools/g++"]),
        ("icpx", ["/bin/g++"]),
        ("g++ '", ["/bin/g++"]),
    ],
)
def test_the_named_compiler_may_have_options_and_others_follow(
    monkeypatch: pytest.MonkeyPatch, given: str | None, command: list[str]
) -> None:
    if given is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", given)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in INSTALLED else None)
    assert cxx("icx", "g++", "clang++") == command


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert cxx("g++", "clang++") is None
