"""An export to ONNX Runtime on the tuned kernels, as custom operators, against its standard operators."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autotune.bench.cpu.language_model import TOLERANCE, Decoding, make_model
from autotune.bench.run import Candidate, Run, Table, check
from export.libraries import need
from export.onnx.runtime import BoundStep, OnnxGraph
from export.onnx.session import OnnxSession
from export.onnx.sidecar import LIBRARY
from export.onnx.state import OnnxState
from ramnet import RamNetConfig, RamNetForCausalLM

STANDARD, KERNELS = "onnxruntime, standard operators", "kernels in onnxruntime"
# The orders whose memories are compared: 4^5 and 4^8 slots.
FEW, MANY = 5, 8
PREFILL, DECODE, SLOTS = "onnx prefill tiny", "onnx decode tiny", "onnx decode by slots"
IN_A_ROW, PROMPT = 16, 1024


def slots(order: int) -> str:
    """Return the name of the row of a memory of 4^order slots."""
    return f"{KERNELS}, M = 4^{order}"


def tables(run: Run, threads: int) -> list[Table]:
    """Compare a prompt and a token on standard operators and on kernels, and a token with few and with many slots."""
    if not run.kernels:
        return []
    try:
        need("onnx", "onnxruntime", "onnxscript")
    except ImportError as error:
        run.notice(f"{KERNELS} left out: {error}")
        return []
    with tempfile.TemporaryDirectory(prefix="ramnet-") as place:
        folder = Path(place)
        both = {STANDARD: _export(run, folder, threads), KERNELS: _export(run, folder, threads, kernels=True)}
        prompts: dict[str, Candidate] = {form: partial(_read, session) for form, session in both.items()}
        tokens: dict[str, Candidate] = {form: _Tokens(session) for form, session in both.items()}
        for forms in (prompts, tokens):
            check(KERNELS, [forms[KERNELS]()], [forms[STANDARD]()], TOLERANCE)
        steps: dict[str, Candidate] = {slots(order): _step(run, folder, threads, order) for order in (FEW, MANY)}
        what = "batch 1, state bound"
        return [
            run.compare(PREFILL, f"batch 1, {PROMPT} tokens", prompts, base=KERNELS, threads=threads),
            run.compare(DECODE, what, tokens, base=KERNELS, calls=IN_A_ROW, threads=threads),
            run.compare(SLOTS, what, steps, base=slots(FEW), calls=IN_A_ROW, threads=threads),
        ]


def _export(run: Run, folder: Path, threads: int, kernels: bool = False) -> OnnxSession:
    from export.onnx.build import export_onnx

    name = KERNELS if kernels else STANDARD
    run.on_step(f"exporting {name}")
    export_onnx(make_model("tiny"), folder / name, kernels=kernels)
    return OnnxSession(folder / name, threads=threads)


def _step(run: Run, folder: Path, threads: int, order: int) -> Candidate:
    """Return a function that reads tokens with 4^order slots. The export is not verified: with 4^8 it takes minutes."""
    from export.onnx import graphs, kernels

    run.on_step(f"building {slots(order)}")
    torch.manual_seed(0)
    model = RamNetForCausalLM(RamNetConfig.preset("tiny", order=order))
    path = folder / str(order)
    path.mkdir()
    kernels.build(model.config, path / LIBRARY, "cpu")
    graphs.save({"decode": graphs.build(model, "decode", kernels=True)}, path)
    graph = OnnxGraph(path / "decode.onnx", threads, path / LIBRARY)
    step = BoundStep(graph, OnnxState.zeros(model.config, 1), 1, model.config.vocab_size)
    token = np.ones((1, 1), np.int64)

    def read() -> None:
        for _ in range(IN_A_ROW):
            step(token)

    return read


def _read(session: OnnxSession) -> Tensor:
    ids = torch.randint(session.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return session.prefill(ids).logits


class _Tokens:
    """A call reads tokens in place."""

    def __init__(self, session: OnnxSession) -> None:
        self.decoding = Decoding(session, OnnxState.zeros(session.config, 1))

    def __call__(self) -> Tensor:
        return torch.cat([self.decoding() for _ in range(IN_A_ROW)])
