"""llama.cpp as a form of the benchmark: a process, models with random weights, and calls of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from autotune.bench.peers import gguf_models
from autotune.bench.peers.serving import Peer, PeerError
from autotune.bench.run import Candidate, Run

MODULE = "autotune.bench.peers.llama_process"
# GCC 12 leaves out stores that configure AMX's tiles, since its intrinsic does not say that it reads them; with these
# flags it does not. The CPU then finds an invalid opcode at the first product of several tokens.
FLAGS = "CXXFLAGS='-fno-dse -fno-tree-dse -fno-tree-sra'"
INSTALL = "-m pip install llama-cpp-python==0.3.36 gguf"
# Names of rows. Where a prompt kills llama.cpp with weights in the layout for AMX, it is measured without, and single
# tokens, which run and are faster, with it, too.
LLAMA, RELAID = "llama.cpp", "llama.cpp, weights in AMX's layout, one token at a time"


class Llama:
    """A process of llama.cpp. Use ``started``."""

    def __init__(self, peer: Peer, folder: Path, threads: int, layouts: dict[str, bool]) -> None:
        """``layouts`` has what ``llama_process.Context`` takes as ``relaid``, by name of row."""
        self._peer, self._folder, self._threads = peer, folder, threads
        self.layouts = layouts

    def write(self, architecture: str, kind: str) -> Path:
        """Return a GGUF file, written at the first call."""
        path = self._folder / f"{architecture}.{kind}.gguf"
        if not path.exists():
            layers = gguf_models.LAYERS[architecture]
            self._peer.call("write", path=str(path), architecture=architecture, kind=kind, layers=layers)
        return path

    def open(self, path: Path, form: str = LLAMA, **settings: Any) -> str:
        """Return the name of a new context with ``settings`` of ``llama_process.Context``."""
        relaid = self.layouts[form]
        context = f"{path.name} {form} {sorted(settings.items())}"
        if form == RELAID:
            settings["block"] = 1
        self._peer.call(
            "open", context=context, path=str(path), relaid=relaid, threads=self._threads, **settings
        )  # fmt: skip
        return context

    def after(self, path: Path, tokens: int, form: str, count: int) -> Candidate:
        """Return a function that reads ``count`` tokens after ``tokens`` others."""
        context = self.open(path, form, tokens=tokens)
        self._peer.call("fill", context=context, tokens=tokens)
        return partial(self._peer.call, "decode", context=context, tokens=count)

    def decoding(self, path: Path, sequences: int, form: str, count: int) -> Candidate:
        """Return a function that reads ``count`` tokens of each of several sequences."""
        context = self.open(path, form, sequences=sequences)
        return partial(self._peer.call, "decode", context=context, tokens=count)

    def prompt(self, path: Path, tokens: int) -> Candidate:
        """Return a function that reads a prompt."""
        context = self.open(path, tokens=tokens, flash=True)
        return partial(self._peer.call, "prefill", context=context, tokens=tokens)


@contextmanager
def started(run: Run, python: str, folder: Path, threads: int) -> Iterator[Llama | None]:
    """Start llama.cpp in the interpreter ``python``; None, with a notice, if it is not installed there."""
    run.on_step("starting llama.cpp")
    with Peer(python, MODULE) as peer:
        try:
            versions = peer.call("versions")
        except PeerError as error:
            run.notice(f"llama.cpp left out: {error}; {FLAGS} {python} {INSTALL}")
            yield None
            return
        run.notice(", ".join(f"{name} {version}" for name, version in versions.items()))
        layouts = {LLAMA: True}
        if not _reads_prompts(python, folder, threads):
            layouts = {LLAMA: False, RELAID: True}
            run.notice(
                "llama.cpp dies here with weights in AMX's layout, so they stay as in the file (use_extra_bufts)"
            )
        yield Llama(peer, folder, threads, layouts)


def _reads_prompts(python: str, folder: Path, threads: int) -> bool:
    """Return whether a process of llama.cpp that lays out int8 weights anew survives a prompt."""
    path = folder / "small.gguf"
    with Peer(python, MODULE) as peer:
        try:
            peer.call("write", path=str(path), architecture="llama", kind="Q8_0", layers=1)
            peer.call("open", context="small", path=str(path), relaid=True, threads=threads)
            peer.call("prefill", context="small", tokens=64)
        except PeerError:
            return False
        finally:
            path.unlink(missing_ok=True)
    return True
