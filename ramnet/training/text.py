"""Byte-level language modelling on the Python standard library's sources, or on given files."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramnet.loss import IGNORED, summed_cross_entropy
from ramnet.training.model import Model

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_SHARE = 20  # one file in 20 is held out
HELD_OUT_WINDOWS = 128


class Windows:
    """All windows of ``length`` bytes with their next bytes, numbered from 0. No window spans two documents.

    A window may begin from ``length`` − 1 bytes before its document up to the document's last byte but one, and is
    clipped to the document, so that every byte is an input in equally many windows. Documents of one byte have no
    windows, as there is nothing to predict.
    """

    def __init__(self, documents: Sequence[bytes], length: int) -> None:
        documents = [document for document in documents if len(document) > 1]
        text = b"".join(documents)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        self.length = length
        self.sizes = torch.tensor([len(document) for document in documents], dtype=torch.int64)
        self.counts = self.sizes + length - 2

    def __len__(self) -> int:
        return int(self.counts.sum())

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the windows of these ``numbers``, int64 [N]: inputs and next bytes as labels, int64 [N, length].

        Beyond the window's bytes, inputs are 0 and labels IGNORED.
        """
        ends = self.counts.cumsum(0)
        which = torch.searchsorted(ends, numbers, right=True)
        start = numbers - (ends - self.counts)[which] - self.length + 1
        first, last = start.clamp(min=0), torch.minimum(start + self.length, self.sizes[which] - 1)
        places = first.unsqueeze(1) + torch.arange(self.length + 1)  # within the document
        begins = (self.sizes.cumsum(0) - self.sizes)[which]
        found = self.text[begins.unsqueeze(1) + places.minimum(last.unsqueeze(1))].long()
        inside = places[:, 1:] <= last.unsqueeze(1)
        return found[:, :-1].where(inside, 0), found[:, 1:].where(inside, IGNORED)


class Text:
    """Random windows of the training files, and fixed windows of held-out files for evaluation.

    Each file is a document, and a window never spans two documents.

    Args:
        files: the text; empty for the standard library's ``.py`` sources. One file in twenty, and at least one, is held
            out, chosen by the hash of its path relative to the files' common folder. Of a single file, the last tenth
            is held out.
        length: bytes in a window.

    Raises:
        ValueError: if ``length`` is below 1, a file cannot be read, or the training or held-out text has no document of
            two bytes.
    """

    metric = "bits per byte"

    def __init__(self, files: Sequence[str | Path] = (), length: int = 256) -> None:
        if length < 1:
            raise ValueError(f"length is {length}; it must be at least 1")
        self.length = length
        self.files = sorted({str(Path(file).resolve()) for file in files})
        sides = split_files([Path(file) for file in self.files] or standard_library())
        for name, documents in zip(("training", "held-out"), sides, strict=True):
            longest = max(map(len, documents))
            if longest < 2:
                raise ValueError(f"the longest document of the {name} text holds {longest} bytes; it needs at least 2")
        self.training, self.held_out = (Windows(documents, length) for documents in sides)
        digest = hashlib.sha256()
        for document in (*sides[0], b"", *sides[1]):
            digest.update(len(document).to_bytes(8, "little") + document)
        self._digest = digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return what defines the task, for a checkpoint."""
        return {
            "task": "text", "files": self.files, "length": self.length, "windows": "within a document",
            "digest": self._digest,
        }  # fmt: skip

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``size`` windows of the training text uniformly; see ``Windows.take``."""
        return self.training.take(torch.randint(len(self.training), (size,), generator=generator))

    @torch.no_grad()
    def evaluate(self, model: Model) -> float:
        """Return the mean bits per byte over evenly spaced windows of the held-out text, each from a fresh state."""
        windows = len(self.held_out)
        numbers = torch.linspace(0, windows - 1, min(windows, HELD_OUT_WINDOWS), dtype=torch.float64).long()
        inputs, labels = self.held_out.take(numbers)
        nats, device = 0.0, model.embedding.weight.device
        for ids, wanted in zip(inputs.split(16), labels.split(16), strict=True):
            hidden = model.hidden_states(ids.to(device))[0].flatten(0, 1)
            chosen = wanted.flatten().to(device)
            nats += float(summed_cross_entropy(model.head, hidden, chosen, model.config.vocab_size))
        return nats / int((labels != IGNORED).sum()) / math.log(2)


def standard_library() -> list[Path]:
    """Return the ``.py`` sources of this Python's standard library, without its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    return sorted(found)


def split_files(files: Sequence[Path]) -> tuple[list[bytes], list[bytes]]:
    """Return the training documents and the held-out documents; see ``Text``."""
    if not files:
        raise ValueError("there is no text to train on; name files with --data")
    texts = {str(file): _read(file) for file in files}
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - len(text) // 10
        return [text[:cut]], [text[cut:]]
    root = os.path.commonpath(list(texts))
    ranked = sorted(texts, key=lambda name: hashlib.sha256(os.path.relpath(name, root).encode()).digest())
    held_out = set(ranked[: max(1, len(ranked) // HELD_OUT_SHARE)])
    return (
        [text for name, text in texts.items() if name not in held_out],
        [text for name, text in texts.items() if name in held_out],
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
