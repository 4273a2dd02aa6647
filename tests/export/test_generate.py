"""``ramnet generate --onnx`` needs no PyTorch, and chooses what PyTorch would."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export.onnx import generate
from export.onnx.model import OnnxModel
from export.onnx.session import OnnxSession
from ramnet.generation.options import SamplingOptions, Stops
from ramnet.generation.sampling import DRAWN_AT_ONCE, Sampling, Uniforms
from tests.export.conftest import Exported

OPTIONS = ["--max-new-tokens", "30", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--seed", "7"]


def test_the_command_needs_no_torch(mixed: Exported) -> None:
    without = "import sys; sys.modules['torch'] = None; from export.generate_cli import generate; generate()"
    command = [sys.executable, "-c", without, "grüße", "--onnx", str(mixed.onnx), *OPTIONS]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    sampled = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 7}
    want = mixed.model.generate(torch.tensor([list("grüße".encode())]), 30, **sampled)
    assert done.stdout.decode() == bytes(want[0].tolist()).decode(errors="replace") + "\n"


@pytest.mark.parametrize("at_once", [1, 5])
def test_long_prompts_are_read_in_parts_and_stops_end_the_text(
    mixed: Exported, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    prompt = list(b"A prompt of 18 ids")
    free = OnnxSession(mixed.onnx, threads=1).generate(torch.tensor([prompt]), 12, repetition_penalty=1.3)
    monkeypatch.setattr(generate, "TOKENS_AT_ONCE", at_once)
    model, options = OnnxModel(mixed.onnx, threads=1), SamplingOptions(repetition_penalty=1.3)
    want = free[0, len(prompt) :].tolist()
    for stops in (Stops((), (), None, 256), Stops({want[5]}, (), None, 256)):
        end = want.index(want[5]) + 1 if stops else len(want)
        assert list(generate.generate(model, np.array(prompt), 12, options, stops, None)) == want[:end]


@pytest.mark.parametrize("seed", [0, 3, -1, 2**32 + 3, 2**64 - 1])
def test_the_numbers_of_a_seed_are_pytorchs(seed: int) -> None:
    want = Uniforms([seed], 1, torch.device("cpu"))
    count = DRAWN_AT_ONCE + 6
    assert list(islice(generate.uniforms(seed), count)) == [float(want()) for _ in range(count)]


def test_numbers_without_a_seed_differ() -> None:
    assert next(generate.uniforms(None)) != next(generate.uniforms(None))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 1e-300}, {"top_k": 3}, {"top_k": 99}, {"top_p": 0.7}, {"top_p": 1e-6},
     {"min_p": 0.2}, {"min_p": 1.0}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
     {"repetition_penalty": 1.7}],
)  # fmt: skip
def test_the_choice_is_pytorchs(options: dict[str, Any]) -> None:
    torchs, ours = Sampling(**{"temperature": 1.0, **options}), SamplingOptions(**{"temperature": 1.0, **options})
    logits = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    logits[20:] = logits[20:].round()  # of equal logits, which are left out depends on their order
    logits[39] = 0
    seen = torch.rand(40, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    penalised = torchs.penalise(logits, seen)
    found = [generate.penalise(ours, *row) for row in zip(logits.numpy(), seen.numpy(), strict=True)]
    assert np.array_equal(found, penalised.numpy())
    want = torchs.choose(penalised, Uniforms([5] * 40, 40, logits.device)).tolist()
    assert [generate.choose(ours, row, generate.uniforms(5)) for row in found] == want


@pytest.mark.parametrize("largest", [np.nan, np.inf, -np.inf])
def test_logits_without_a_largest_are_an_error(largest: float) -> None:
    logits = np.full((1, 1, 256), largest, np.float32)
    model: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=256), read=lambda ids, state: (logits, None))
    with pytest.raises(RuntimeError, match="the largest logit is NaN or infinite"):
        next(generate.generate(model, np.array([1]), 1, SamplingOptions(), Stops((), (), None, 256), None))
