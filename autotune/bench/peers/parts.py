"""The parts of ``ramnet bench --peers``: our model against others of as many parameters, on the same threads."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from autotune.bench.cpu.language_model import COMPILED
from autotune.bench.peers import llama, transformer
from autotune.bench.peers.ours import PRESET, Ours, made
from autotune.bench.run import Candidate, Run, Table
from export.libraries import need
from ramnet import RamNetForCausalLM

LENGTHS = (128, 4096, 32_768)
PROMPT, SEQUENCES = 1024, 8
# The tokens of a call: the first one after a pause finds threads asleep and caches cold.
IN_A_ROW = 4
# The time for the rounds of a table, on two cores eight or more.
SECONDS = 30.0
RECURRENT = {"mamba2": "Mamba-2", "rwkv7": "RWKV-7"}
BFLOAT16 = "in bfloat16"
ONNX = "onnxruntime, Transformer++"


class Place(NamedTuple):
    """What the parts share.

    Attributes:
        python: the interpreter that has llama_cpp and gguf.
        folder: where gigabytes of weights are written, which are removed after each part.
        threads: of every form.
    """

    python: str
    folder: Path
    threads: int


def after(form: str, tokens: int) -> str:
    """Return the name of the row of a form's token after ``tokens`` others."""
    return f"{form} after {tokens}"


def library(precision: str) -> str:
    """Return the name of our library's row."""
    return f"RAM-Net, library {precision}"


def decode_float32(run: Run, place: Place) -> list[Table]:
    """A token against llama.cpp's Transformer, in float32."""
    return _decode(run, place, "float32", "F32")


def decode_int8(run: Run, place: Place) -> list[Table]:
    """A token against llama.cpp's Transformer, in int8."""
    return _decode(run, place, "int8", "Q8_0")


def _decode(run: Run, place: Place, precision: str, kind: str) -> list[Table]:
    name = f"decode {precision}"
    with _folder(place) as folder, llama.started(run, place.python, folder, place.threads) as theirs:
        if theirs is None:
            return []
        run.on_step(f"{name}: writing llama.cpp's model")
        path = theirs.write("llama", kind)
        forms: dict[str, Candidate] = {}
        for tokens in LENGTHS:
            for form in theirs.layouts if kind == "Q8_0" else (llama.LLAMA,):
                run.on_step(f"{name}: filling llama.cpp's cache with {tokens} tokens")
                forms[after(form, tokens)] = theirs.after(path, tokens, form, IN_A_ROW)
        ours = Ours(run, made(run), precision, folder, place.threads)
        forms |= {after(library(precision), tokens): ours.after(tokens, IN_A_ROW) for tokens in LENGTHS}
        base = after(library(precision), LENGTHS[0])
        what = f"a token, {PRESET} and llama.cpp's Llama of as many parameters in {kind}"
        return [run.compare(name, what, forms, base=base, calls=IN_A_ROW, threads=place.threads, seconds=SECONDS)]


def recurrent(run: Run, place: Place) -> list[Table]:
    """A token against llama.cpp's models of a fixed state, one sequence and several, in int8."""
    tables = []
    with _folder(place) as folder, llama.started(run, place.python, folder, place.threads) as theirs:
        if theirs is None:
            return []
        paths = {}
        for architecture, name in RECURRENT.items():
            run.on_step(f"writing llama.cpp's {name}")
            paths[name] = theirs.write(architecture, "Q8_0")
        ours = Ours(run, made(run), "int8", folder, place.threads)
        for sequences in (1, SEQUENCES):
            forms = {library("int8"): ours.decoding(sequences, IN_A_ROW)}
            for name, path in paths.items():
                for form in theirs.layouts if sequences == 1 else (llama.LLAMA,):
                    forms[f"{name}, {form}"] = theirs.decoding(path, sequences, form, IN_A_ROW)
            what = f"a token of each of {sequences} sequences, int8 and Q8_0, as many parameters"
            table = f"recurrent {sequences}"
            tables.append(
                run.compare(
                    table, what, forms, base=library("int8"), calls=IN_A_ROW, threads=place.threads, seconds=SECONDS
                )
            )
    return tables


def onnx(run: Run, place: Place) -> list[Table]:
    """A token against the same Transformer in onnxruntime, with its keys and values in place, in float32."""
    try:
        need("onnx", "onnxruntime")
    except ImportError as error:
        run.notice(f"{ONNX} left out: {error}")
        return []
    with _folder(place) as folder:
        run.on_step("writing the Transformer as ONNX")
        graph = transformer.write(transformer.as_many_parameters(), folder, LENGTHS[-1] + IN_A_ROW)
        theirs = transformer.Session(graph, place.threads)
        ours = Ours(run, made(run), "float32", folder, place.threads)
        forms = {}
        for tokens in LENGTHS[1:]:
            forms[after(library("float32"), tokens)] = ours.after(tokens, IN_A_ROW)
            forms[after(ONNX, tokens)] = theirs.after(tokens, IN_A_ROW)
        base = after(library("float32"), LENGTHS[1])
        what = "a token, float32, as many parameters"
        return [
            run.compare("decode onnx", what, forms, base=base, calls=IN_A_ROW, threads=place.threads, seconds=SECONDS)
        ]


def prefill(run: Run, place: Place) -> list[Table]:
    """A prompt, of which the last token's logits are wanted, against llama.cpp's Transformer."""
    with _folder(place) as folder, llama.started(run, place.python, folder, place.threads) as theirs:
        if theirs is None:
            return []
        forms = {}
        for kind in ("F32", "Q8_0"):
            run.on_step(f"writing llama.cpp's model in {kind}")
            forms[f"llama.cpp {kind}"] = theirs.prompt(theirs.write("llama", kind), PROMPT)
        model = made(run)
        forms[library("int8")] = Ours(run, model, "int8", folder, place.threads).prompt(PROMPT)
        forms[COMPILED] = _compiled(run, model)
        forms[f"{COMPILED} {BFLOAT16}"] = _compiled(run, copy.deepcopy(model).bfloat16())
        what = f"{PROMPT} tokens, {PRESET} and llama.cpp's Llama of as many parameters"
        return [run.compare("prefill", what, forms, base=library("int8"), threads=place.threads, seconds=2 * SECONDS)]


def _compiled(run: Run, model: RamNetForCausalLM) -> Candidate:
    """Return a function that reads a prompt on kernels and compiled modules, in the model's type."""
    import lowering

    run.on_step("compiling the model")
    compiled = lowering.compile(model, target=run.target)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def read() -> None:
        logits = compiled(ids, logits_to_keep=1).logits
        if not logits.isfinite().all():
            raise ValueError(f"the model in {logits.dtype} gives logits that are not finite")

    return read


PARTS: dict[str, Callable[[Run, Place], list[Table]]] = {
    "decode-float32": decode_float32,
    "decode-int8": decode_int8,
    "recurrent": recurrent,
    "onnx": onnx,
    "prefill": prefill,
}


@contextmanager
def _folder(place: Place) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="peers-", dir=place.folder) as path:
        yield Path(path)
