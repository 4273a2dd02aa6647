"""Kinds of input that ``fuzz`` changes: arguments of calls and of the command line."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from torch import Tensor

from ramnet import RamNetForCausalLM, RamState, ops
from tests.robustness.fuzz import Case
from tests.robustness.models import PROMPT, SMALL, small_fast_model, small_model
from tests.samples import relative_rmse


class Ids(Case):
    """Ids given to a model, with states and options that may be invalid."""

    @torch.no_grad()
    def make(self, folder: Path) -> None:
        for batch in (1, 2, 3):
            state = small_fast_model()(PROMPT[:, :2].expand(batch, 2)).state
            small_fast_model()(PROMPT[:, :1].expand(batch, 1), state, in_place=True)

    def mutate(self, folder: Path, chance: random.Random) -> Any:
        shape = chance.choice([(1, 5), (1, 1), (2, 1), (1, 0), (0, 3), (5,), (1, 1, 1), (3, 2), ()])
        dtype = chance.choice([torch.int64] * 4 + [torch.int32, torch.int8, torch.float32, torch.bool])
        values = [chance.choice([0, 1, 255, 256, -1, 2**31, -(2**62)] if chance.random() < 0.2 else [3, 7])
                  for _ in range(math.prod(shape))]  # fmt: skip
        ids = torch.tensor(values, dtype=torch.int64).view(shape).to(dtype)
        state = chance.choice([None, None, self._state(chance)])
        settings = {
            "temperature": chance.choice([0.0, 0.8, -1.0, math.nan, math.inf, 1e-300]),
            "top_k": chance.choice([0, 1, 5, -1, 10**9]), "top_p": chance.choice([1.0, 0.5, 0.0, math.nan]),
            "seed": chance.choice([None, 0, -1, 2**64]), "stop_tokens": chance.choice([(), (3,), (10**9,)]),
        }  # fmt: skip
        if chance.random() < 0.5:
            settings = {name: value for name, value in settings.items() if chance.random() < 0.2}
        return ids, state, settings, chance.random() < 0.5, chance.choice([0, 1, 3, -1])

    @staticmethod
    @torch.no_grad()
    def _state(chance: random.Random) -> RamState:
        state = RamState.zeros(SMALL, chance.choice([1, 1, 1, 2]))
        how = chance.randrange(6)
        if how == 1:
            positions = [torch.tensor(x) for x in ([-1], [0.0, 0.0], [2**62], [0.5], 3)]
            state.position = chance.choice(positions)
        elif how == 2:
            state.memory[0] = state.memory[0].mT.contiguous().mT
        elif how == 3:
            state.mass[0] = state.mass[0].to(chance.choice([torch.float64, torch.int64, torch.bfloat16]))
        elif how == 4:
            state.conv = []
        return state

    def use(self, folder: Path, changed: Any) -> None:
        ids, state, settings, in_place, keep = changed
        with torch.no_grad():
            given = [None if state is None else state.clone() for _ in range(2)]
            expected = self._call(small_model(), ids, given[0], in_place, keep)
            found = self._call(small_fast_model(), ids, given[1], in_place, keep)
            assert type(found) is type(expected), f"{expected!r} but {found!r} on kernels"
            if isinstance(expected, Tensor):
                assert relative_rmse(found, expected) < 1e-4
        out = small_model().generate(ids, 3, **settings)
        assert out.shape == (ids.shape[0], ids.shape[1] + 3) or settings.get("stop_tokens")

    @staticmethod
    def _call(model: RamNetForCausalLM, ids: Tensor, state: RamState | None, in_place: bool, keep: int) -> Any:
        """Return the logits, or the ValueError or TypeError that the model raises."""
        try:
            return model(ids, state, in_place=in_place, logits_to_keep=keep).logits
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error), str(error)
            return error


class OpInputs(Case):
    """Tensors given to the ops: kernels must refuse what the reference refuses, and otherwise give its results."""

    def mutate(self, folder: Path, chance: random.Random) -> Any:
        def size() -> int:
            return chance.choice([1, 2, 3]) if chance.random() < 0.95 else chance.choice([0, 7])

        batch, heads, tokens = (size() for _ in range(3))
        # Sizes and γ that are compiled into a kernel are drawn from few values.
        top_k, num_slots, dim = chance.choice([(2, 4, 3), (2, 4, 3), (3, 3, 1), (5, 3, 3), (0, 4, 3), (2, 4, 0)])
        floats = [torch.float32] * 5 + [torch.float64, torch.float16]

        def tensor(*shape: int) -> Tensor:
            if chance.random() < 0.03:
                shape = (*shape, 2)
            return torch.rand(shape).to(chance.choice(floats) if chance.random() < 0.1 else torch.float32)

        def slots() -> Tensor:
            order = torch.rand(batch, heads, tokens, max(num_slots, top_k)).argsort(-1)[..., :top_k].int()
            if chance.random() < 0.2 and order.numel():
                order.view(-1)[chance.randrange(order.numel())] = chance.choice([-1, num_slots, 2**31 - 1, -(2**31)])
            return order.long() if chance.random() < 0.02 else order

        torch.manual_seed(chance.randrange(2**31))
        rows = (batch, heads, tokens)
        tensors = [slots(), tensor(*rows, top_k), slots(), tensor(*rows, top_k), tensor(*rows, dim),
                   tensor(batch, heads, num_slots, dim), 0.1 + tensor(batch, heads, num_slots)]  # fmt: skip
        return tensors, chance.choice([1.0, 0.5, 0.0, -1.0, math.nan, math.inf])

    def use(self, folder: Path, changed: Any) -> None:
        tensors, gamma = changed
        results = []
        for kernels in ("", "cpu"):
            try:
                with ops.using(kernels):
                    results.append(ops.memory_scan(*tensors, decay_power=gamma))
            except (ValueError, TypeError) as error:
                results.append(error)
        expected, found = results
        if isinstance(expected, Exception):
            assert isinstance(found, Exception), f"the reference says {expected}"
            raise expected
        if isinstance(found, Exception):
            raise AssertionError(f"kernels say {found}")
        assert all(relative_rmse(a, b) < 1e-2 for a, b in zip(found, expected, strict=True))


class Prompts(Case):
    """``ramnet generate``."""

    def make(self, folder: Path) -> None:
        small_model().save_pretrained(folder / "model")

    def mutate(self, folder: Path, chance: random.Random) -> Any:
        text = chance.choice(["a", "", "é\udcff", "\udc80", "x" * 3000, "\n\0", "-", "--", "日本" * 40])
        options = {
            "--max-new-tokens": ["0", "2", "-1", "x", "1e3"], "--temperature": ["0", "1", "nan", "-inf", "x"],
            "--top-k": ["0", "3", "-2", "2.5"], "--top-p": ["1", "0.2", "0", "nan", "2"],
            "--seed": ["0", "-1", str(2**70), "x"], "--kernels": ["", "cpu", "none"],
        }  # fmt: skip
        chosen = [(name, chance.choice(values)) for name, values in options.items() if chance.random() < 0.25]
        return [text, "--max-new-tokens", "2", *(part for option in chosen for part in option)]

    def use(self, folder: Path, changed: Any) -> None:
        from export.generate_cli import generate

        words = ["a"] if changed is None else changed
        result = CliRunner().invoke(generate, [*words, "--checkpoint", str(folder / "model")], standalone_mode=False)
        if result.exception is not None:
            raise result.exception
