"""An export to ONNX Runtime on the tuned kernels, as custom operators, against its standard operators."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autotune.bench.cpu.language_model import TOLERANCE, Decoding
from autotune.bench.run import Candidate, Run, Table, check
from export.libraries import need
from export.onnx.session import OnnxSession
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
        sized = {slots(order): _export(run, folder, threads, kernels=True, order=order) for order in (FEW, MANY)}
        prompts: dict[str, Candidate] = {form: partial(_read, session) for form, session in both.items()}
        tokens: dict[str, Candidate] = {form: _Tokens(session) for form, session in both.items()}
        for forms in (prompts, tokens):
            check(KERNELS, [forms[KERNELS]()], [forms[STANDARD]()], TOLERANCE)
        steps: dict[str, Candidate] = {form: _Tokens(session) for form, session in sized.items()}
        what = "batch 1, state bound"
        return [
            run.compare(PREFILL, f"batch 1, {PROMPT} tokens", prompts, base=KERNELS, threads=threads),
            run.compare(DECODE, what, tokens, base=KERNELS, calls=IN_A_ROW, threads=threads),
            run.compare(SLOTS, what, steps, base=slots(FEW), calls=IN_A_ROW, threads=threads),
        ]


def _export(run: Run, folder: Path, threads: int, kernels: bool = False, **settings: int) -> OnnxSession:
    from export.onnx.build import export_onnx

    name = f"{KERNELS if kernels else STANDARD} {settings}"
    run.on_step(f"exporting {name}")
    torch.manual_seed(0)
    path = folder / name
    export_onnx(RamNetForCausalLM(RamNetConfig.preset("tiny", **settings)), path, kernels=kernels)
    return OnnxSession(path, threads=threads)


def _read(session: OnnxSession) -> Tensor:
    ids = torch.randint(session.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return session.prefill(ids).logits


class _Tokens:
    """A call reads tokens in place."""

    def __init__(self, session: OnnxSession) -> None:
        self.decoding = Decoding(session, OnnxState.zeros(session.config, 1))

    def __call__(self) -> Tensor:
        return torch.cat([self.decoding() for _ in range(IN_A_ROW)])
