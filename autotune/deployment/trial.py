"""One trial, in a process of its own that can be killed: ``python -m autotune.deployment.trial REQUEST``.

It builds deployments, checks each against PyTorch's logits, times them in turn, and prints an ``Answer``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from autotune.measure.timing import interleaved, ratio
from export.c.session import WEIGHTS, CModel
from export.samples import TOLERANCE, Samples
from ramnet.config import RamNetConfig
from schedules.deployment import Deployment

BASE, COMPILED = "base", "lowering.compile"
TEXT = "text.npz"
BLOCK = 256  # tokens of a prompt


class Request(BaseModel):
    """What to measure.

    Attributes:
        folder: has a folder of weights and samples for each precision, and maybe held-out text.
        base: the deployment that the ratios are relative to.
        others: deployments to time, by name.
        compiled: also time ``lowering.compile``.
        prompts: time prompts of ``BLOCK`` tokens instead of single tokens.
        judge: measure the loss of this precision, in bits per token.
    """

    config: RamNetConfig
    folder: Path
    base: Deployment
    others: dict[str, Deployment]
    compiled: bool = False
    prompts: bool = False
    judge: str | None = None
    rounds: int
    seconds: float


class Measured(BaseModel):
    """Seconds of a token, and their ratio to the base's with its spread, paired by rounds."""

    seconds: float
    ratio: float
    spread: float


class Answer(BaseModel):
    """What was measured; ``bits`` a token of the judged precision and of float32."""

    times: dict[str, Measured]
    bits: tuple[float, float] | None = None


def run(request: Request) -> Answer:
    """Raises ValueError if a deployment's logits are wrong."""
    candidates: dict[str, Any] = {}
    kept: dict[Deployment, CModel] = {}
    for name, deployment in {BASE: request.base, **request.others}.items():
        model = kept.get(deployment) or kept.setdefault(deployment, _open(request, deployment))
        candidates[name] = partial(_read, model, model.state(), request.prompts)
    count = BLOCK if request.prompts else _IN_A_ROW
    if request.compiled:
        candidates[COMPILED] = _compiled(request)
    timings = interleaved(candidates, request.rounds, request.seconds)
    times = {}
    for name, timing in timings.items():
        over = ratio(timings, of=name, over=BASE)
        times[name] = Measured(seconds=timing.median / count, ratio=over.median, spread=over.spread)
    bits = None
    if request.judge is not None:
        chosen = next(model for deployment, model in kept.items() if deployment.precision == request.judge)
        bits = _bits(request, kept[request.base], chosen)
    return Answer(times=times, bits=bits)


_IN_A_ROW = 8


def _read(model: CModel, state: Any, prompts: bool) -> None:
    if prompts:
        state.reset()
        model.tokens(state, np.arange(BLOCK) * 37 % model.vocabulary)
    else:
        for i in range(_IN_A_ROW):
            model.token(state, i * 37 % model.vocabulary)


def _open(request: Request, deployment: Deployment) -> CModel:
    """Build a library and check its logits on the samples."""
    from lowering.aot import build
    from lowering.aot.matrix import Tiling

    tiling = Tiling(rows=deployment.rows, tokens=deployment.tokens, lanes=deployment.lanes)
    path = build.shared_library(request.config, deployment.precision, build.Loops(tiling, deployment.spins))
    folder = request.folder / deployment.precision
    model = CModel(path, folder / WEIGHTS, deployment.threads)
    samples = Samples.load(folder)
    half, state = len(samples.ids) // 2, model.state()
    first = [model.token(state, int(token)) for token in samples.ids[:half]]
    found = np.concatenate([first, model.tokens(state, samples.ids[half:], len(samples.ids) - half)])
    error, tolerance = samples.error(found), TOLERANCE[deployment.precision]
    if not error <= tolerance:
        raise ValueError(f"the logits are off by {error:.1e}; the tolerance is {tolerance:.0e}")
    return model


def _compiled(request: Request) -> Any:
    """Return a function that reads tokens with ``lowering.compile`` as it is by default."""
    import torch

    import lowering
    from ramnet import RamNetForCausalLM, RamState
    from ramnet.state import read_safetensors

    torch.set_num_threads(request.base.threads)
    model = RamNetForCausalLM(request.config).eval()
    tied = request.config.tie_embeddings
    model.load_state_dict(read_safetensors(request.folder / "float32" / WEIGHTS), strict=not tied)
    compiled, state = lowering.compile(model), RamState.zeros(request.config, 1)
    ids = [torch.tensor([[i * 37 % request.config.vocab_size]]) for i in range(_IN_A_ROW)]

    @torch.no_grad()
    def read() -> None:
        for token in ids:
            compiled(token, state, in_place=True)

    return read


def _bits(request: Request, reference: CModel, model: CModel) -> tuple[float, float]:
    """Return the bits a token of a model and of the float32 model, which is ``reference``.

    Without text, the float32 model's own predictions after random tokens are what is to be predicted.
    """
    text = request.folder / TEXT
    if text.exists():
        with np.load(text) as file:
            windows = list(zip(file["ids"], file["labels"], strict=True))
    else:
        windows = [(Samples.load(request.folder / "float32").ids, None)]
    bits, count = np.zeros(2), 0
    for ids, labels in windows:
        mine, theirs = (_log_probabilities(each, ids) for each in (model, reference))
        if labels is None:
            bits -= [float((np.exp(theirs) * x).sum()) for x in (mine, theirs)]
            count += len(ids)
        else:
            kept = labels >= 0
            bits -= [float(np.take_along_axis(x[kept], labels[kept, None], 1).sum()) for x in (mine, theirs)]
            count += int(kept.sum())
    found = bits / count / np.log(2)
    return float(found[0]), float(found[1])


def _log_probabilities(model: CModel, ids: NDArray[Any]) -> NDArray[np.float64]:
    logits = model.tokens(model.state(), ids, len(ids)).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return found


if __name__ == "__main__":
    answer = run(Request.model_validate_json(Path(sys.argv[1]).read_bytes()))
    sys.stdout.write(answer.model_dump_json() + "\n")
