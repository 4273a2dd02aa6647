"""A thousand random mutations, the same in each run; ``fuzz`` tries others for a given time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="inputs are tried on the CPU kernels, which need tvm: pip install 'ramnet[tvm]'")
pytest.importorskip("optuna", reason="journals need optuna: pip install 'ramnet[tune]'")
pytest.importorskip("onnxruntime", reason="exports need onnxruntime: pip install 'ramnet[export]'")

from tests.robustness import fuzz
from tests.robustness.kinds import KINDS

MUTATIONS = {
    "config": 260, "checkpoint": 150, "training": 15, "state": 200, "ids": 50, "ops": 100, "records": 100,
    "journal": 80, "export": 30, "prompts": 20,
}  # fmt: skip


def test_every_kind_is_mutated_a_thousand_times_in_all() -> None:
    assert MUTATIONS.keys() == KINDS.keys() and sum(MUTATIONS.values()) >= 1000


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_input_is_refused_in_one_sentence_or_right(kind: str) -> None:
    assert fuzz.run(KINDS[kind](), seed=0, mutations=MUTATIONS[kind]) == MUTATIONS[kind]


class Breaks(fuzz.Case):
    """A case whose use breaks what must hold."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def mutate(self, folder: Path, chance: random.Random) -> None:
        pass

    def use(self, folder: Path, changed: Any) -> None:
        if self.fault == "traceback":
            raise KeyError("x")
        if self.fault == "lines":
            raise ValueError("one\ntwo")
        if self.fault == "numbers":
            assert 1 == 2
        if self.fault == "file":
            (folder.parent / "left").touch()
        if self.fault == "hang":
            while True:
                pass
        if self.fault == "memory":
            bytearray(b"x") * (2 * fuzz.BYTES)


@pytest.mark.parametrize("fault", ["traceback", "lines", "numbers", "file", "hang", "memory"])
def test_a_fault_of_each_kind_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "BYTES", 1 << 24)
    with pytest.raises(fuzz.UnfitError, match="Breaks, seed 0, mutation 0"):
        fuzz.run(Breaks(fault), seed=0, mutations=1)
