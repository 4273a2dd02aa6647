"""Documents as tokens: bytes, or what a tokenizer makes of them, kept in files that are mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ramnet.config import BYTES
from ramnet.files import folder_written_aside, sha256

INDEX, _TOKENS, _SIZES = "index.json", ".tokens", ".sizes.npy"
# Documents that are tokenised at a time, by all cores, and their bytes: tokenizers need 31 bytes of memory for each.
TOGETHER, BYTES_TOGETHER = 256, 4 << 20


class Tokens:
    """Documents one after another.

    Attributes:
        ids: the tokens of all documents, unsigned, in memory or mapped from a file.
        sizes: int64 [documents], the tokens of each.
    """

    def __init__(self, ids: np.ndarray, sizes: Tensor) -> None:
        self.ids, self.sizes = ids, sizes

    @classmethod
    def of_bytes(cls, documents: Sequence[bytes]) -> Self:
        """Return the bytes of ``documents`` as tokens."""
        sizes = torch.tensor([len(document) for document in documents], dtype=torch.int64)
        return cls(np.frombuffer(b"".join(documents), dtype=np.uint8), sizes)

    @cached_property
    def starts(self) -> Tensor:
        """int64 [documents], where each begins in ``ids``."""
        return self.sizes.cumsum(0) - self.sizes

    def at(self, places: Tensor) -> Tensor:
        """Return the tokens at these places of ``ids``, int64 of the shape of ``places``."""
        return torch.from_numpy(self.ids[places.numpy()].astype(np.int64))


class Tokenizer:
    """A tokenizer file of Hugging Face's tokenizers.

    Whatever truncation or padding the file asks for is not applied, as documents are kept whole.

    Raises ValueError if the file is not one, or if it has ids of ``vocab_size`` or above; ImportError if the package
    tokenizers is missing.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ImportError("--tokenizer needs the package tokenizers: pip install 'ramnet[text]'") from None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself
            raise ValueError(f"{path} is not a tokenizer file: {error}") from None
        self.path, self.digest = path, hashlib.sha256(content).hexdigest()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # ids need not be consecutive
        if self.size > vocab_size:
            raise ValueError(f"{path} has {self.size} token ids but the model's vocabulary has only {vocab_size}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it.

        Raises ValueError, naming the tokenizer's file, if it cannot tokenise a text.
        """
        try:
            found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself
            raise ValueError(f"{self.path} cannot tokenise the text: {error}") from None
        return [each.ids for each in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with the names of special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def stream(self, ids: Sequence[int]) -> Callable[[int], str]:
        """Return a function that takes the tokens after ``ids`` one by one and returns the text that each completes."""
        from tokenizers.decoders import DecodeStream

        streams = [DecodeStream(skip_special_tokens=False)]

        def step(token: int) -> str:
            try:
                return streams[0].step(self._tokenizer, token) or ""
            except Exception:  # noqa: BLE001 - tokenizers raises Exception itself, for bytes that are no UTF-8
                streams[0] = DecodeStream(skip_special_tokens=False)
                return "\ufffd"

        for token in ids:
            step(token)
        return step

    @property
    def dtype(self) -> np.dtype:
        """The narrowest type that holds every id."""
        return np.dtype(np.uint16 if self.size <= 2**16 else np.uint32)


def of_bytes(path: Path) -> bool:
    """Return whether the tokens of a tokenizer file are the bytes of UTF-8, as of ``ramnet.hf.byte_tokenizer``."""
    text = "".join(map(chr, range(32, 127))) + "\n\t\0é漢🙂"
    try:
        return Tokenizer(path, BYTES).encode([text]) == [list(text.encode())]
    except (ImportError, ValueError):
        return False


def write_tokens(
    folder: Path, digest: str, sides: dict[str, Iterable[tuple[str, bytes]]], tokenizer: Tokenizer
) -> None:
    """Tokenise documents into ``folder``, which is written whole or not at all.

    Args:
        digest: of all that the tokens depend on; ``read_tokens`` compares it.
        sides: the documents of each part, such as "training", with the name of the file that each is in.

    Raises ValueError if ``folder`` holds other files, or, naming the file, if a document is not UTF-8.
    """
    folder = folder.resolve()  # a link is kept, and its target is replaced
    names = {INDEX, *(f"{side}{end}" for side in sides for end in (_TOKENS, _SIZES))}
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; the tokens need a folder there, so move it away")
        if foreign := sorted({path.name for path in folder.iterdir()} - names):
            raise ValueError(f"{folder} would be replaced, but {foreign[0]} is not of this program; move it away")
    with folder_written_aside(folder) as aside:
        parts: dict[str, Any] = {}
        for side, documents in sides.items():
            sizes: list[int] = []
            length, digest_of_ids = 0, hashlib.sha256()
            with (aside / f"{side}{_TOKENS}").open("wb") as file:
                for several in _batches(documents):
                    for ids in tokenizer.encode([_text(*document) for document in several]):
                        file.write(content := np.asarray(ids, tokenizer.dtype).tobytes())
                        digest_of_ids.update(content)
                        sizes.append(len(ids))
                    length += sum(len(document) for _, document in several)
            np.save(aside / f"{side}{_SIZES}", np.asarray(sizes, np.int64))
            digests = [digest_of_ids.hexdigest(), sha256(aside / f"{side}{_SIZES}")]
            parts[side] = {"tokens": sum(sizes), "documents": len(sizes), "bytes": length, "sha256": digests}
        index = {"digest": digest, "dtype": tokenizer.dtype.name, "tokenizer": tokenizer.digest, "parts": parts}
        (aside / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _batches(documents: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Yield documents in lists of at most ``TOGETHER``, each of which ends once it has ``BYTES_TOGETHER``."""
    several, size = [], 0
    for document in documents:
        several.append(document)
        size += len(document[1])
        if len(several) == TOGETHER or size >= BYTES_TOGETHER:
            yield several
            several, size = [], 0
    if several:
        yield several


def read_tokens(folder: Path, digest: str) -> dict[str, tuple[Tokens, int]] | None:
    """Return the tokens of each part, mapped into memory, and the bytes of its text; None if ``folder`` has no tokens
    of this ``digest`` as they were written."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["digest"] != digest:
            return None
        found = {}
        for side, part in index["parts"].items():
            path, dtype = folder / f"{side}{_TOKENS}", np.dtype(index["dtype"])
            if [sha256(folder / f"{side}{end}") for end in (_TOKENS, _SIZES)] != part["sha256"]:
                return None
            sizes = torch.from_numpy(np.load(folder / f"{side}{_SIZES}"))
            if path.stat().st_size != part["tokens"] * dtype.itemsize or int(sizes.sum()) != part["tokens"]:
                return None
            ids = np.memmap(path, dtype, "r") if part["tokens"] else np.empty(0, dtype)
            found[side] = Tokens(ids, sizes), int(part["bytes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    return found


def documents(file: Path) -> Iterator[bytes]:
    """Yield the documents of a file: the "text" of each line of ``.jsonl``, or the whole of any other file.

    Raises ValueError, naming the file, if it cannot be read or a line is not an object with a text.
    """
    try:
        if file.suffix != ".jsonl":
            yield file.read_bytes()
            return
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"].encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{file} line {number} has a text that is not UTF-8: {error}") from None
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{file} line {number} is not JSON: {error}") from None
                except (KeyError, TypeError, AttributeError):
                    raise ValueError(f'{file} line {number} is not an object with a "text"') from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _text(name: str, document: bytes) -> str:
    try:
        return document.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text: byte {error.start} is not UTF-8, which a tokenizer needs") from None
