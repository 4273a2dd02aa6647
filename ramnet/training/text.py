"""Language modelling on the Python standard library's sources, or on given files, in bytes or in tokens."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ramnet.files import sha256
from ramnet.loss import IGNORED, summed_cross_entropy
from ramnet.training.batch import Batch
from ramnet.training.checkpoint import OTHER_TEXT
from ramnet.training.model import Model
from ramnet.training.recipe import MOST
from ramnet.training.tokens import Tokenizer, Tokens, documents, read_tokens, write_tokens
from ramnet.training.windows import ROWS, Carried, Kind, Windows

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_SHARE = 20  # one file in 20 is held out
HELD_OUT_WINDOWS = 128


class Text:
    """Rows of the training files, and fixed windows of held-out files for evaluation.

    Each file is a document, and each line of a ``.jsonl`` file; no row mixes two documents.

    Args:
        files: the text; empty for the standard library's ``.py`` sources. One file in twenty, and at least one, is held
            out, chosen by the hash of its path relative to the files' common folder. Of a single file, the last
            twentieth of its documents is held out, or the last tenth of its only one.
        length: tokens in a row.
        windows: how rows are taken from documents.
        tokenizer: what makes tokens of text; None for bytes.
        cache: the folder where tokens are kept, from which later runs on the same files map them into memory.
        digest: that of ``describe``, of the run that is resumed. Nothing is written for another text.

    Raises:
        ValueError: if ``length`` is below 1, a file cannot be read or, for a tokenizer, is not UTF-8, the text is not
            that of ``digest``, or the training or held-out text has no document of two tokens.
    """

    metric = "bits per byte"

    def __init__(
        self,
        files: Sequence[str | Path] = (),
        length: int = 256,
        windows: Kind = "within a document",
        tokenizer: Tokenizer | None = None,
        cache: Path | None = None,
        digest: str | None = None,
    ) -> None:
        _check_length(length)
        if tokenizer is not None and cache is None:
            raise ValueError("a tokenizer is given without a folder for its tokens")
        self.length, self.windows, self.tokenizer = length, windows, tokenizer
        self.files = _distinct(files)
        paths = [Path(file) for file in self.files] or standard_library()
        if tokenizer is None or cache is None:
            sides = split_files(paths)
            found = hashlib.sha256()
            for document in (*sides[0], b"", *sides[1]):
                found.update(len(document).to_bytes(8, "little") + document)
            self._set_digest(found.hexdigest(), digest)
            training, held_out = (Tokens.of_bytes(side) for side in sides)
            self.tokens_per_byte = 1.0
        else:
            found = _digest(paths, tokenizer)
            self._set_digest(found.hexdigest(), digest)
            (training, _), (held_out, size) = _tokenised(paths, tokenizer, cache, found.hexdigest())
            self.tokens_per_byte = int(held_out.sizes.sum()) / max(1, size)
        unit = "bytes" if tokenizer is None else "tokens"
        for name, side in (("training", training), ("held-out", held_out)):
            longest = int(side.sizes.max()) if len(side.sizes) else 0
            if longest < 2:
                raise ValueError(f"the longest document of the {name} text holds {longest} {unit}; it needs at least 2")
        self.training, self.held_out = ROWS[windows](training, length), Windows(held_out, length)

    def _set_digest(self, found: str, wanted: str | None) -> None:
        self._digest = found[:16]
        if wanted not in (None, self._digest):
            raise ValueError(OTHER_TEXT)

    @classmethod
    def of(cls, description: dict[str, Any], vocab_size: int, cache: Path) -> Self:
        """Return the task of a ``description``, as ``describe`` returns it, for a model of ``vocab_size`` tokens."""
        return cls(
            description["files"],
            description["length"],
            description.get("windows", "within a document"),
            cls.check(description, vocab_size),
            cache,
            description.get("digest"),
        )

    @staticmethod
    def check(description: dict[str, Any], vocab_size: int) -> Tokenizer | None:
        """Check what can be checked of a description without reading the text, and return its tokenizer.

        Raises ValueError if a file cannot be opened, is a pipe, or its name is not UTF-8, the length is not in 1..2^31,
        or the tokens do not fit ``vocab_size``.
        """
        _check_length(description["length"])
        for file in map(_name, description["files"]):
            if Path(file).is_fifo():
                raise ValueError(f"{file} is a pipe, which can be read only once; write it to a file")
            try:
                Path(file).open("rb").close()
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}") from None
        path = description.get("tokenizer")
        tokenizer = None if path is None else Tokenizer(Path(_name(path)), vocab_size)
        if tokenizer is None and vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}; bytes need at least 256")
        return tokenizer

    def describe(self) -> dict[str, Any]:
        """Return what defines the task, for a checkpoint."""
        tokenizer = {} if self.tokenizer is None else {"tokenizer": _name(self.tokenizer.path.resolve())}
        return {
            "task": "text", "files": self.files, "length": self.length, "windows": self.windows,
            "digest": self._digest, **tokenizer,
        }  # fmt: skip

    @property
    def places(self) -> Tensor | None:
        """What a checkpoint keeps of rows that are carried on; see ``Carried``."""
        return self.training.places if isinstance(self.training, Carried) else None

    @places.setter
    def places(self, places: Tensor | None) -> None:
        if isinstance(self.training, Carried):
            self.training.resume(places)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw ``size`` rows of the training text."""
        return self.training.batch(size, generator)

    @torch.no_grad()
    def evaluate(self, model: Model) -> float:
        """Return the mean bits per byte over evenly spaced windows of the held-out text, each from a fresh state.

        A token counts as the mean bytes of a token of the held-out text.
        """
        batch = self.held_out.spread(HELD_OUT_WINDOWS)
        nats, device = 0.0, model.embedding.weight.device
        for part in batch.few_tokens():
            hidden = model.hidden_states(part.inputs.to(device))[0].flatten(0, 1)
            wanted = part.labels.flatten().to(device)
            nats += float(summed_cross_entropy(model.head, hidden, wanted, model.config.vocab_size))
        return nats / int((batch.labels != IGNORED).sum()) * self.tokens_per_byte / math.log(2)


def _check_length(length: int) -> None:
    if not 1 <= length <= MOST:
        raise ValueError(f"length is {length}; it must be in 1..2^31")


def standard_library() -> list[Path]:
    """Return the ``.py`` sources of this Python's standard library, without its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    return sorted(found)


def split_files(files: Sequence[Path]) -> tuple[list[bytes], list[bytes]]:
    """Return the training documents and the held-out documents; see ``Text``."""
    training, held_out = _sides(files)
    return [document for _, document in training], [document for _, document in held_out]


def _sides(files: Sequence[Path]) -> tuple[Iterable[tuple[str, bytes]], Iterable[tuple[str, bytes]]]:
    """Return the training and the held-out documents, each with the name of its file. Files are read as they are
    reached, except for a single one."""
    if not files:
        raise ValueError("there is no text to train on; name files with --data")
    if len(files) == 1:
        found = [(str(files[0]), document) for document in documents(files[0])]
        if len(found) == 1:
            ((name, text),) = found
            cut = len(text) - len(text) // 10
            while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # within a character
                cut -= 1
            return [(name, text[:cut])], [(name, text[cut:])]
        cut = len(found) - max(1, len(found) // HELD_OUT_SHARE)
        return found[:cut], found[cut:]
    held_out = _held_out(files)

    def side(of_held_out: bool) -> Iterator[tuple[str, bytes]]:
        for file in files:
            if (file in held_out) == of_held_out:
                for document in documents(file):
                    yield str(file), document

    return side(False), side(True)


def _distinct(files: Sequence[str | Path]) -> list[str]:
    """Return the ``_name`` of files, one of those that are links to the same file."""
    found: dict[Path, str] = {}
    for name in sorted(map(_name, files)):
        found.setdefault(Path(name).resolve(), name)
    return list(found.values())


def _name(file: str | Path) -> str:
    """Return the one absolute name of a file, however its folder is spelled. A link keeps its own name, whose suffix
    says how the file is read.

    Raises ValueError if the name is not UTF-8, which a checkpoint could not hold.
    """
    name = str(Path(file).parent.resolve() / Path(file).name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name of the file {os.fsencode(name)!r} is not UTF-8; rename it") from None
    return name


def _held_out(files: Sequence[Path]) -> set[Path]:
    """Return which of several files are held out."""
    root = os.path.commonpath(files)
    ranked = sorted(files, key=lambda file: hashlib.sha256(os.path.relpath(file, root).encode()).digest())
    return set(ranked[: max(1, len(ranked) // HELD_OUT_SHARE)])


def _digest(files: Sequence[Path], tokenizer: Tokenizer) -> Any:
    """Return a hash of the tokenizer and of each file, in their order, with how it is split and whether it is held
    out."""
    digest = hashlib.sha256(tokenizer.digest.encode())
    held_out = _held_out(files) if len(files) > 1 else ()
    for file in files:
        digest.update(bytes((file.suffix == ".jsonl", file in held_out)))
        try:
            digest.update(bytes.fromhex(sha256(file)))
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    return digest


def _tokenised(
    files: Sequence[Path], tokenizer: Tokenizer, cache: Path, digest: str
) -> tuple[tuple[Tokens, int], tuple[Tokens, int]]:
    """Return the tokens of both sides and the bytes of their text, from ``cache`` if it has them."""
    found = read_tokens(cache, digest)
    if found is None or found.keys() != {"training", "held-out"}:
        training, held_out = _sides(files)
        write_tokens(cache, digest, {"training": training, "held-out": held_out}, tokenizer)
        found = read_tokens(cache, digest)
    if found is None:
        raise ValueError(f"{cache} was changed while its tokens were written; start again")
    return found["training"], found["held-out"]
