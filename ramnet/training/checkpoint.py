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

from ramnet.config import one_line
from ramnet.model import RamNetForCausalLM
from ramnet.state import read_safetensors, write_safetensors

FILE = "training.safetensors"


class Progress(BaseModel):
    """How far a run is, and what it is a run of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: dict[str, Any] = Field(description="the model's RamNetConfig")
    task: dict[str, Any] = Field(description="the task's describe()")
    recipe: dict[str, Any] = Field(description="the Recipe")
    step: int = Field(ge=0, description="optimizer steps made")
    elapsed: float = Field(ge=0, description="seconds trained")

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

    The weights are in both, so that what a run resumes from is one file, renamed into place.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors["generator"] = generator.get_state()
    with _interrupts_deferred():
        model.save_pretrained(directory)
        write_safetensors(directory / FILE, tensors, {"progress": json.dumps(progress.model_dump())})


def load(
    directory: Path, model: RamNetForCausalLM, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Put what ``save`` wrote back in place; ValueError, naming the file, where it does not fit the model."""
    path = directory / FILE
    tensors = read_safetensors(path)
    parameters = dict(model.named_parameters())
    moments: dict[int, dict[str, Tensor]] = {}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                if tensors[f"model.{name}"].shape != parameter.shape:
                    raise KeyError(f"model.{name} of shape {list(parameter.shape)}")
                parameter.copy_(tensors[f"model.{name}"])
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        generator.set_state(tensors["generator"])
    except KeyError as error:
        raise ValueError(f"{path} does not fit the model: it lacks {error.args[0]}") from None
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


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
