"""What a precision costs a language model, in bits per byte of text that it was not trained on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from export.manifest import Quality, Speed
from export.model import float32
from export.samples import TOKENS
from lowering.targets import cpu_name
from ramnet import RamNetForCausalLM
from ramnet.loss import IGNORED
from ramnet.ops import using
from ramnet.training.text import Text
from ramnet.training.tokens import Tokens
from ramnet.training.windows import Windows

_WINDOWS, _LENGTH = 64, 256
_PARAMETERS = 1 << 28  # of all windows together, so that a model of 340 million is measured on one window


class HeldOut(NamedTuple):
    """Windows of text.

    Attributes:
        source: where it is from.
        ids, labels: int64 [N, L]; labels of −100 do not count.
        tokens_per_byte: of the text; 1 if tokens are bytes.
    """

    source: str
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    tokens_per_byte: float = 1.0


def held_out(checkpoint: Path) -> HeldOut:
    """Return windows of the text that the training of ``checkpoint`` held out.

    Raises ValueError if the checkpoint was not trained on text, or its files cannot be read or have changed.
    """
    text = _text(checkpoint)
    ids, labels = _some(text.held_out)
    where = f"{len(text.files)} files" if text.files else "the sources of Python's standard library"
    return HeldOut(f"held out from {where}", ids.numpy(), labels.numpy(), text.tokens_per_byte)


def calibration(checkpoint: Path, file: Path | None = None) -> list[torch.Tensor]:
    """Return windows, int64 [length] each, of a file's bytes or of the text that ``checkpoint`` was trained on.

    Raises ValueError as ``held_out`` does, or if the file cannot be read or has no text.
    """
    if file is None:
        text = _text(checkpoint)
        return _whole(Windows(text.training.tokens, text.length))
    try:
        windows = Windows(Tokens.of_bytes([file.read_bytes()]), _LENGTH)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if not len(windows):
        raise ValueError(f"{file} has no text to calibrate on")
    return _whole(windows)


def _text(checkpoint: Path) -> Text:
    from ramnet.training.checkpoint import Progress

    progress = Progress.load(checkpoint)
    task = progress.task
    if task.get("task") != "text":
        raise ValueError(f"{checkpoint} was not trained on text")
    text = Text.of(task, progress.config.vocab_size, checkpoint / "tokens")
    if text.describe() != task:
        raise ValueError(f"the text that {checkpoint} was trained on has changed")
    return text


def _whole(windows: Windows) -> list[torch.Tensor]:
    """Return windows without what is beyond the ends of documents."""
    return [ids[labels != IGNORED] for ids, labels in zip(*_some(windows), strict=True)]


def _some(windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    batch = windows.spread(_WINDOWS)
    return batch.inputs, batch.labels


def windows(model: RamNetForCausalLM) -> int:
    """Return on how many windows a model of this size is measured."""
    return max(1, _PARAMETERS // sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def measure(
    model: RamNetForCausalLM, text: HeldOut, logits: Callable[[NDArray[np.int32]], NDArray[np.float32]]
) -> Quality:
    """Compare an exported model with PyTorch in float32.

    Args:
        logits: returns the logits, [T, V], of the exported model after each of T ids from a fresh state.
    """
    reference = float32(model)
    nats, same, count = np.zeros(2), 0, 0
    with using("cpu" if find_spec("tvm") else ""):  # the reference takes a minute for 64 windows of "tiny"
        for ids, labels in zip(text.ids[: windows(model)], text.labels[: windows(model)], strict=True):
            mine = logits(ids.astype(np.int32)).astype(np.float64)
            theirs = reference(torch.from_numpy(ids)[None]).logits[0].numpy().astype(np.float64)
            counted = labels != IGNORED
            nats += [_nats(each[counted], labels[counted]) for each in (mine, theirs)]
            same += int((mine.argmax(1) == theirs.argmax(1))[counted].sum())
            count += int(counted.sum())
    bits = nats / count * text.tokens_per_byte / math.log(2)
    return Quality(
        text=text.source, tokens=count, bits_per_byte=float(bits[0]), float32=float(bits[1]), agreement=same / count
    )


def _nats(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the summed negative log-likelihood."""
    largest = logits.max(1, keepdims=True)
    totals = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0]
    return float((totals - np.take_along_axis(logits, labels[:, None], 1)[:, 0]).sum())


def speed(token: Callable[[int], object], vocabulary: int, threads: int) -> Speed:
    """Time calls of ``token``, which reads an id."""
    seconds = []
    for i in range(TOKENS):
        start = perf_counter()
        token(i % vocabulary)
        seconds.append(perf_counter() - start)
    return Speed(token_seconds=statistics.median(seconds), threads=threads, processor=cpu_name())
