"""Our model as it is deployed: the C library with weights in a file, and states after any number of tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from autotune.bench.cpu.language_model import make_model
from autotune.bench.cpu.token import deployed
from autotune.bench.run import Candidate, Run
from export.c.session import CModel, CState
from ramnet import RamNetConfig, RamNetForCausalLM, RamState

PRESET = "340m"


class Ours:
    """The library in one precision."""

    def __init__(self, run: Run, model: RamNetForCausalLM, precision: str, folder: Path, threads: int) -> None:
        run.on_step(f"building the library of {PRESET} in {precision}")
        self._config: RamNetConfig = model.config
        self._folder = folder
        self.library: CModel = deployed(model, precision, folder, threads)[0]
        self._random = np.random.default_rng(0)

    def state(self, tokens: int) -> CState:
        """Return a state as after ``tokens`` tokens: its position, and memory that is random instead of read.

        A token's time depends on neither.
        """
        torch.manual_seed(0)
        state = RamState.zeros(self._config, 1)
        for memory, mass in zip(state.memory, state.mass, strict=True):
            memory.normal_()
            mass.uniform_(0.5, 2)
        state.position.fill_(tokens)
        path = self._folder / "state"
        state.save(path)
        found = self.library.state()
        found.load(path)
        path.unlink()
        return found

    def after(self, tokens: int, count: int) -> Candidate:
        """Return a function that reads ``count`` tokens after ``tokens`` others."""
        return partial(self._tokens, self.state(tokens), count)

    def decoding(self, sequences: int, count: int) -> Candidate:
        """Return a function that reads ``count`` tokens of each of ``sequences`` sequences."""
        return partial(self._steps, [self.state(0) for _ in range(sequences)], count)

    def prompt(self, tokens: int) -> Candidate:
        """Return a function that reads a prompt."""
        ids = self._ids(tokens)
        return lambda: self.library.tokens(self.library.state(), ids)

    def _ids(self, count: int) -> np.ndarray:
        return self._random.integers(0, self._config.vocab_size, count)

    def _tokens(self, state: CState, count: int) -> None:
        for token in self._ids(count):
            logits = self.library.token(state, int(token))
        _check(logits)

    def _steps(self, states: list[CState], count: int) -> None:
        for _ in range(count):
            logits = self.library.step(states, self._ids(len(states)))
        _check(logits)


def _check(logits: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise ValueError("the library gives logits that are not finite")


def made(run: Run) -> RamNetForCausalLM:
    """Return our model with random weights."""
    run.on_step(f"making the model {PRESET}")
    return make_model(PRESET)
