"""Byte-level text: the Python standard library's sources, or files of one's own."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramnet.model import RamNetForCausalLM

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_SHARE = 20  # one file in so many is held out
HELD_OUT_WINDOWS = 128


class Text:
    """Random windows of bytes for training, and fixed ones of other files to measure the loss on.

    Args:
        files: the text; empty for the standard library's ``.py`` sources. One file in twenty, at least one, chosen by
            the hash of its path below the files' common folder, is held out; of a single file, the last tenth.
        length: bytes of a window.

    Raises:
        ValueError: for a missing or unreadable file, or too little text for a window on either side.
    """

    metric = "bits per byte"

    def __init__(self, files: Sequence[str | Path] = (), length: int = 256) -> None:
        if length < 1:
            raise ValueError(f"length is {length}; it must be at least 1")
        self.length = length
        self.files = sorted({str(Path(file).resolve()) for file in files})
        training, held_out = split_files([Path(file) for file in self.files] or standard_library())
        self.training, self.held_out = _as_tensor(training), _as_tensor(held_out)
        for name, data in (("training", self.training), ("held-out", self.held_out)):
            if len(data) <= length:
                raise ValueError(
                    f"the {name} text holds {len(data)} bytes; windows of {length} need at least {length + 1}"
                )
        self._digest = hashlib.sha256(training + b"\0\0" + held_out).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What defines the task, for a checkpoint."""
        return {"task": "text", "files": self.files, "length": self.length, "digest": self._digest}

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``size`` windows from random places: inputs and the bytes that follow each, int64 [size, length]."""
        starts = torch.randint(len(self.training) - self.length, (size,), generator=generator)
        return _windows(self.training, starts, self.length)

    @torch.no_grad()
    def evaluate(self, model: RamNetForCausalLM) -> float:
        """Mean bits per byte over evenly spaced windows of the held-out files, each read from an empty state."""
        starts = torch.linspace(0, len(self.held_out) - self.length - 1, HELD_OUT_WINDOWS, dtype=torch.float64).long()
        inputs, labels = _windows(self.held_out, starts, self.length)
        nats = [
            F.cross_entropy(model(ids).logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
            for ids, wanted in zip(inputs.split(16), labels.split(16), strict=True)
        ]
        return sum(nats) / labels.numel() / math.log(2)


def standard_library() -> list[Path]:
    """The ``.py`` sources of the running Python's standard library, without its tests, in order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    return sorted(found)


def split_files(files: Sequence[Path]) -> tuple[bytes, bytes]:
    """The bytes of the training and of the held-out files, a 0 byte between files; see ``Text``."""
    if not files:
        raise ValueError("there is no text to train on; name files with --data")
    texts = {str(file): _read(file) for file in files}
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - len(text) // 10
        return text[:cut], text[cut:]
    root = os.path.commonpath(list(texts))
    ranked = sorted(texts, key=lambda name: hashlib.sha256(os.path.relpath(name, root).encode()).digest())
    held_out = set(ranked[: max(1, len(ranked) // HELD_OUT_SHARE)])
    return (
        b"\0".join(text for name, text in texts.items() if name not in held_out),
        b"\0".join(text for name, text in texts.items() if name in held_out),
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    windows = text[starts.unsqueeze(1) + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]
