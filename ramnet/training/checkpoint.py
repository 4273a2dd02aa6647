"""Training checkpoints: everything that resuming needs, in one file that is written atomically."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ramnet.config import BYTES, RamNetConfig, one_line
from ramnet.files import locked_alone
from ramnet.model import WEIGHT_TYPES, filled, not_finite
from ramnet.state import RamState, read_safetensors, write_safetensors
from ramnet.training.model import Config, Model, make
from ramnet.training.recipe import Recipe

FILE = "training.safetensors"
FILES = (FILE, "config.json", "model.safetensors")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter
KINDS = ("weight", *MOMENTS)
OTHER_TEXT = (
    "the text or its tokenizer is not that of the run that is resumed; give its files as they were, or start a new run"
    " from its weights"
)


class Progress(BaseModel):
    """The settings of a run and how far it has come."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: Config
    task: dict[str, Any] = Field(description="the task's describe()")
    recipe: Recipe
    step: int = Field(ge=0, description="steps, including skipped ones")
    elapsed: float = Field(ge=0, description="seconds trained")
    skipped: int = Field(0, ge=0, description="steps skipped because the loss or gradient was not finite")
    micro_batch: int | None = Field(None, gt=0, description="rows computed at a time, which may change")
    recompute: bool = Field(False, description="whether activations are recomputed, which may change")
    compiled: bool = Field(False, description="whether torch.compile compiles the model, which may change")
    checkpoint_seconds: float = Field(30.0, description="seconds between checkpoints, which may change")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read the progress of the checkpoint in ``directory``. Raises ValueError, naming the file, if it has none."""
        from safetensors import SafetensorError

        path = Path(directory) / FILE
        if not path.is_file():
            raise ValueError(f"{directory} holds no training to resume: it has no {FILE}")
        try:
            return cls.model_validate_json(_progress_in(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        except ValidationError as error:
            raise ValueError(f"{path} is not a training checkpoint: {one_line(error)}") from None


def _progress_in(path: Path) -> str:
    """Return the progress in a checkpoint's file as JSON, without its fields if there is none."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str((file.metadata() or {}).get("progress", "{}"))


def tokenizer_of(directory: str | Path) -> Path | None:
    """Return the tokenizer of the model in ``directory``: the ``tokenizer.json`` there, or else the file that it was
    trained with. None if there is none, or if its tokens are the bytes."""
    from safetensors import SafetensorError

    from ramnet.training.tokens import of_bytes

    own = Path(directory) / "tokenizer.json"
    if own.is_file():
        return None if of_bytes(own) else own
    try:
        return Path(json.loads(_progress_in(Path(directory) / FILE))["task"]["tokenizer"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # the weights do not need this file
        return None


def check_of_bytes(config: RamNetConfig, directory: str | Path) -> None:
    """Raise ValueError if the token ids of the model in ``directory`` are not bytes."""
    if config.vocab_size != BYTES:
        raise ValueError(f"{directory} has {config.vocab_size} tokens; text needs a byte-level model, of {BYTES}")
    if (tokenizer := tokenizer_of(directory)) is not None:
        raise ValueError(f"{directory} has the tokens of {tokenizer}; text needs a byte-level model")


def save(
    directory: Path, progress: Progress, model: Model, saved: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Write the model (``save_pretrained``) and ``training.safetensors``: ``saved`` and the state of the data's
    generator.

    The weights are in both, so that a run resumes from a single file, which is replaced atomically. The caller must
    have checked that all values are finite.

    Args:
        saved: what ``tensors`` returns and, of rows that are carried on, their "places" and "state.…".
    """
    with _interrupts_deferred():
        model.save_pretrained(directory)
        saved = saved | {"generator": generator.get_state()}
        write_safetensors(directory / FILE, saved, {"progress": json.dumps(progress.model_dump())})


def tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and moments by their names in ``training.safetensors``.

    They are not copied, except for those that are shared out over processes, which all call this function together.
    """
    named = {}
    for name, parameter in model.named_parameters():
        named[f"weight.{name}"] = whole(parameter.detach())
        # AdamW creates its moments, as zeros, in the first step.
        moments = optimizer.state[parameter] or {
            moment: torch.zeros(()) if moment == "step" else torch.zeros_like(parameter) for moment in MOMENTS
        }
        named |= {f"{moment}.{name}": whole(moments[moment]) for moment in MOMENTS}
    return named


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor's full tensor, which all processes call together, or any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def complete(config: Config, saved: dict[str, Tensor]) -> Model:
    """Return a model whose weights are those of ``saved``, without copying them."""
    with torch.device("meta"):
        model = make(config)
    return filled(model, {name.removeprefix("weight."): x for name, x in saved.items() if name.startswith("weight.")})


class Loaded(NamedTuple):
    """What a checkpoint holds besides the weights and the data's generator.

    Attributes:
        moments: those of each parameter by its name.
        places: of rows that are carried on; None if there are none.
        state: of these rows.
    """

    moments: dict[str, dict[str, Tensor]]
    places: Tensor | None
    state: RamState | None


def load(directory: Path, model: Model, generator: torch.Generator) -> Loaded:
    """Restore weights and generator, in the dtypes of the file rather than those of ``model``, and return the rest.

    Raises ValueError, naming the file, if it does not fit the model or is not finite. Nothing is changed then.
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
    device = model.embedding.weight.device
    state = _carried(path, found, model.config, device)
    moments = {}
    for name, parameter in model.named_parameters():
        parameter.data, *others = (found[f"{kind}.{name}"].to(device, copy=True) for kind in KINDS)
        moments[name] = dict(zip(MOMENTS, others, strict=True))
    generator.set_state(found["generator"])
    return Loaded(moments, found.get("places"), state)


def restore(moments: dict[str, dict[str, Tensor]], model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer these moments; of a parameter that is shared out over processes, each takes its share."""
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = moments[name]
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(parameter, DTensor)
            for kind in MOMENTS[1:]:
                # Every process has read the file, so none sends anything.
                optimizer.state[parameter][kind] = distribute_tensor(
                    moments[name][kind], parameter.device_mesh, parameter.placements, src_data_rank=None
                )


def _carried(path: Path, found: dict[str, Tensor], config: Config, device: torch.device) -> RamState | None:
    """Return the state of rows that are carried on, or None if there is none. Raises ValueError if it is damaged."""
    tensors = {name.removeprefix("state."): x for name, x in found.items() if name.startswith("state.")}
    if not tensors:
        return None

    def layers(kind: str) -> list[Tensor]:
        count = sum(name.startswith(f"{kind}.") for name in tensors)
        return [tensors[f"{kind}.{i}"].to(device) for i in range(count)]

    try:
        state = RamState(layers("memory"), layers("mass"), layers("conv"), tensors["position"].to(device))
        if not isinstance(config, RamNetConfig):
            raise ValueError("the model has no state")
        state.check(config, len(state.position), device)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no state of the model's rows: {error}") from None
    return state


def check_writable(directory: Path, *names: str) -> None:
    """Raise ValueError if ``directory`` cannot be created or written to, or one of its files ``names`` is a folder.
    Nothing is created."""
    for name in names:
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a folder; it must be a file, or absent")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{directory} cannot be a folder: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{directory} cannot be written: {existing} is read-only; choose another --output")


@contextmanager
def alone(directory: Path | None) -> Iterator[None]:
    """Keep other processes from training in ``directory`` within the block; None does nothing.

    Raises ValueError if another process trains there.
    """
    if directory is None:
        yield
        return
    check_writable(directory)
    with locked_alone(directory / ".lock", f"{directory} is in use: another process trains there; choose another"):
        yield


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block ends, so that either all or none of its files are written."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
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
