"""Trials of deployments, in a process of their own that can be killed.

Each opens deployments, checks them on samples, and times them in turn.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from pydantic import BaseModel

from autotune.deployment import judge
from autotune.deployment.stored import MODEL
from autotune.measure.timing import interleaved, ratio
from export.c.session import WEIGHTS, CModel
from export.samples import TOLERANCE, Samples
from ramnet.config import RamNetConfig
from schedules.deployment import AnyDeployment, OnnxDeployment

BASE, COMPILED, UNTUNED = "base", "lowering.compile", "the untuned export"
BLOCK = 256  # tokens of a prompt


class Request(BaseModel):
    """What to measure.

    Attributes:
        folder: of ``Stored``, with the groups of these deployments and, to time ``lowering.compile``, the model.
        base: the deployment that the ratios are relative to.
        others: deployments to time, by name.
        compiled: also time ``lowering.compile``.
        prompts: time prompts of ``BLOCK`` tokens instead of single tokens.
        judge: measure how well the base predicts.
    """

    config: RamNetConfig
    folder: Path
    base: AnyDeployment
    others: dict[str, AnyDeployment]
    compiled: bool = False
    prompts: bool = False
    judge: bool = False
    rounds: int
    seconds: float


class Measured(BaseModel):
    """Seconds of a token, and their ratio to the base's with its spread, paired by rounds."""

    seconds: float
    ratio: float
    spread: float


class Answer(BaseModel):
    """What was measured.

    Attributes:
        bits: bits a token of the base, if it was judged, and of float32.
        opening: the longest seconds of building, loading and checking a deployment; None if all were open.
    """

    times: dict[str, Measured]
    opening: float | None = None
    bits: tuple[float, float] | None = None


class Trials:
    """Runs requests. Models stay open until a request is without them."""

    def __init__(self) -> None:
        self.open: dict[AnyDeployment, Any] = {}

    def run(self, request: Request) -> Answer:
        """Raises ValueError if a deployment's logits are wrong."""
        import lowering.aot.token  # noqa: F401  takes seconds once, which are not those of a library

        models: dict[str, Any] = {}
        kept: dict[AnyDeployment, Any] = {}
        opening = None
        for name, deployment in {BASE: request.base, **request.others}.items():
            begin, known = perf_counter(), kept.get(deployment) or self.open.get(deployment)
            model = kept[deployment] = known or _open(request, deployment)
            if known is None:
                opening = max(opening or 0.0, perf_counter() - begin)
            models[name] = model
        self.open = kept
        base = models[BASE]
        count = BLOCK if request.prompts else _in_a_row(base)
        candidates: dict[str, Any] = {
            name: partial(_read, model, model.state(), count, request.prompts) for name, model in models.items()
        }
        if request.compiled:
            candidates[COMPILED] = _compiled(request, count)
        timings = interleaved(candidates, request.rounds, request.seconds)
        times = {}
        for name, timing in timings.items():
            over = ratio(timings, of=name, over=BASE)
            times[name] = Measured(seconds=timing.median / count, ratio=over.median, spread=over.spread)
        bits = None
        if request.judge:
            bits = judge.bits(request.folder / judge.FILENAME, lambda ids: base.tokens(base.state(), ids, len(ids)))
        return Answer(times=times, bits=bits, opening=opening)


# Threads of the deployment that was timed before look for work for some milliseconds more.
_FEWEST, _MOST, _SECONDS_IN_A_ROW = 8, 512, 0.05


def _in_a_row(model: Any) -> int:
    """Return how many tokens are timed in a row."""
    state = model.state()
    _read(model, state, _FEWEST, prompts=False)
    begin = perf_counter()
    _read(model, state, _FEWEST, prompts=False)
    return min(_MOST, max(_FEWEST, round(_SECONDS_IN_A_ROW * _FEWEST / (perf_counter() - begin))))


def _read(model: Any, state: Any, count: int, prompts: bool) -> None:
    if prompts:
        model.tokens(state, np.arange(count) * 37 % model.vocabulary)
    else:
        for i in range(count):
            model.token(state, i * 37 % model.vocabulary)


class Onnx:
    """An ONNX export with the methods of ``CModel``, of which ``tokens`` leaves the state as it is."""

    def __init__(self, folder: Path, deployment: OnnxDeployment) -> None:
        from export.onnx.model import OnnxModel

        self._model = OnnxModel(folder, deployment=deployment)
        self.state, self.vocabulary = self._model.state, self._model.config.vocab_size

    def token(self, state: Any, token: int) -> Any:
        return self._model.step(np.array([[token]]), state)[0, 0]

    def tokens(self, state: Any, ids: Any, last: int = 1) -> Any:
        return self._model.prefill(ids.astype(np.int64)[None], state)[0][0, -last:]


def _open(request: Request, deployment: AnyDeployment) -> Any:
    """Open a deployment, whose library is built, and check its logits on the samples."""
    from lowering.aot import build

    folder = request.folder / deployment.group
    model: Any
    if isinstance(deployment, OnnxDeployment):
        model = Onnx(folder, deployment)
    else:
        path = build.shared_library(request.config, deployment.precision, build.Loops.of(deployment))
        model = CModel(path, folder / WEIGHTS, deployment.threads)
    samples = Samples.load(folder)
    half, state = len(samples.ids) // 2, model.state()
    first = [model.token(state, int(token)) for token in samples.ids[:half]]
    found = np.concatenate([first, model.tokens(state, samples.ids[half:], len(samples.ids) - half)])
    error, tolerance = samples.error(found), TOLERANCE[deployment.precision]
    if not error <= tolerance:
        raise ValueError(f"the logits are off by {error:.1e}; the tolerance is {tolerance:.0e}")
    return model


def _compiled(request: Request, count: int) -> Any:
    """Return a function that reads tokens with ``lowering.compile`` as it is by default."""
    import torch

    import lowering
    from ramnet import RamNetForCausalLM, RamState

    torch.set_num_threads(request.base.threads)
    model = RamNetForCausalLM.from_pretrained(request.folder / MODEL).eval()
    compiled, state = lowering.compile(model), RamState.zeros(request.config, 1)
    ids = [torch.tensor([[i * 37 % request.config.vocab_size]]) for i in range(count)]

    @torch.no_grad()
    def read() -> None:
        for token in ids:
            compiled(token, state, in_place=True)

    return read
