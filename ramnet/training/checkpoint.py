"""Training that can be left and taken up again: everything it needs in one file, written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ramnet.config import RamNetConfig, one_line
from ramnet.model import WEIGHT_TYPES, RamNetForCausalLM, not_finite
from ramnet.state import read_safetensors, write_safetensors
from ramnet.training.recipe import Recipe

FILE = "training.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter
KINDS = ("weight", *MOMENTS)


class Progress(BaseModel):
    """How far a run is, and what it is a run of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: RamNetConfig
    task: dict[str, Any] = Field(description="the task's describe()")
    recipe: Recipe
    step: int = Field(ge=0, description="optimizer steps made")
    elapsed: float = Field(ge=0, description="seconds trained")
    skipped: int = Field(0, ge=0, description="of the steps, those not taken, their gradient not being finite")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """What the checkpoint in ``directory`` is of; ValueError, naming the file, where there is none."""
        from safetensors import SafetensorError, safe_open

        path = Path(directory) / FILE
        if not path.is_file():
            raise ValueError(f"{directory} holds no training to resume: it has no {FILE}")
        try:
            with safe_open(path, "pt") as file:
                return cls.model_validate_json((file.metadata() or {}).get("progress", "{}"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        except ValidationError as error:
            raise ValueError(f"{path} is not a training checkpoint: {one_line(error)}") from None


def save(
    directory: Path,
    progress: Progress,
    model: RamNetForCausalLM,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Write the model (``save_pretrained``) and ``training.safetensors``: weights, moments and the data's generator.

    The weights are in both, so that what a run resumes from is one file, renamed into place. The caller has seen that
    all numbers are finite.
    """
    saved = tensors(model, optimizer) | {"generator": generator.get_state()}
    with _interrupts_deferred():
        model.save_pretrained(directory)
        write_safetensors(directory / FILE, saved, {"progress": json.dumps(progress.model_dump())})


def tensors(model: RamNetForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments, not copied, under the names that they have in ``training.safetensors``."""
    named = {}
    for name, parameter in model.named_parameters():
        named[f"weight.{name}"] = parameter.detach()
        # Before the first step there are no moments; AdamW begins with zeros.
        moments = optimizer.state[parameter] or {
            moment: torch.zeros(()) if moment == "step" else torch.zeros_like(parameter) for moment in MOMENTS
        }
        named |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
    return named


def load(
    directory: Path, model: RamNetForCausalLM, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Put what ``save`` wrote back in place, in the types that it had, whatever those of ``model`` are.

    ValueError, naming the file and before anything is changed, where it does not fit the model or is not finite.
    """
    path = directory / FILE
    found = read_safetensors(path)
    for name, parameter in model.named_parameters():
        for kind in KINDS:
            shape = [] if kind == "step" else list(parameter.shape)
            tensor = found.get(f"{kind}.{name}")
            if tensor is None or list(tensor.shape) != shape:
                raise ValueError(f"{path} does not fit the model: it lacks {kind}.{name} of shape {shape}")
            kept = found[f"weight.{name}"].dtype
            wanted = WEIGHT_TYPES if kind == "weight" else (torch.float32 if kind == "step" else kept,)
            if tensor.dtype not in wanted:
                raise ValueError(f"{path}: {kind}.{name} is {tensor.dtype}; it must be {wanted[0]}")
    if (wrong := not_finite(found)) is not None:
        raise ValueError(f"{path} holds NaN or infinity in {wrong}, so the run cannot be resumed")
    try:
        torch.Generator().set_state(found["generator"])
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(f"{path} holds no state of the data's generator") from None
    for name, parameter in model.named_parameters():
        parameter.data, *moments = (found[f"{kind}.{name}"].to(parameter.device, copy=True) for kind in KINDS)
        optimizer.state[parameter] = dict(zip(MOMENTS, moments, strict=True))
    generator.set_state(found["generator"])


def check_writable(directory: Path) -> None:
    """ValueError where ``directory`` cannot be made or written to; touches nothing."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{directory} cannot be a folder: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{directory} cannot be written: {existing} is read-only; choose another --output")


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C and a plain ``kill`` back until the block ends, so that its files belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: received.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in received:
        signal.raise_signal(late)
