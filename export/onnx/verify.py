"""Verifies an export against its model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.onnx.ports import GRAPHS
from export.onnx.replay import Replay
from export.onnx.session import OnnxOutput, OnnxSession, run_copying
from export.onnx.state import OnnxState
from ramnet import RamNetForCausalLM, RamNetOutput, RamState
from ramnet.ops import register_backend, using

BATCHES = (1, 2, 5)
LENGTHS = (1, 7, 63)
STEPS = 64
CHECKS = len(BATCHES) * (len(LENGTHS) + 3)

# By the precision of the weights. The largest error measured in float32 was 2e-6, with three layers of an untrained
# "340m"; deeper models have larger errors.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 2e-1}


@dataclass(frozen=True)
class Check:
    """One comparison. The errors of the logits and of the state are divided by max(1, largest magnitude).

    ``addresses`` is the largest difference of logarithms between the weight of a chosen slot and the best of its rank.
    ``agreement`` is the fraction of tokens with the same most probable next token.
    """

    name: str
    batch: int
    logits: float
    state: float
    addresses: float
    agreement: float
    tolerance: float

    @property
    def error(self) -> float:
        return float(np.max([self.logits, self.state, self.addresses]))  # np.max propagates NaN

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def check_graphs(directory: Path, domains: Collection[str] = ()) -> None:
    """Raise ValueError if onnx's checker or shape inference rejects a graph, or it has operators of other domains than
    the standard and ``domains``."""
    import onnx

    for name in GRAPHS:
        path = directory / f"{name}.onnx"
        try:
            onnx.checker.check_model(path, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ValueError(f"{path.name} is not valid ONNX: {error}") from None
        model = onnx.load(path, load_external_data=False)
        foreign = {domain.domain for domain in model.opset_import} - {"", "ai.onnx", *domains}
        if foreign or model.functions:
            raise ValueError(f"{path.name} needs other operators than it should: {', '.join(sorted(foreign))}")


@torch.no_grad()
def compare(model: RamNetForCausalLM, session: OnnxSession) -> Iterator[Check]:
    """Compare onnxruntime with the model on the reference ops, yielding ``CHECKS`` comparisons.

    For each batch size: prefill of each length from a fresh state; then, with positions that differ between rows and
    pass M or 2^31, prefill from that state, 64 decode steps, and the same steps with the state copied instead of bound.
    """
    generator, tolerance = torch.Generator().manual_seed(0), TOLERANCES[session.sidecar.precision]
    layers = model.config.num_layers
    replay = Replay()
    register_backend("replay", replay)

    def expect(ids: Tensor, state: RamState | None, slots: list[Tensor], in_place: bool = False) -> RamNetOutput:
        replay.slots.extend(slots)
        with using("replay"):
            return model(ids, state, in_place=in_place)

    def prefill(tokens: int, state: RamState | None, onnx_state: OnnxState) -> tuple[RamNetOutput, OnnxOutput]:
        ids = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator)
        found, slots = run_copying(session.graphs["prefill"], ids, onnx_state, layers)
        return expect(ids, state, slots), found

    def check(name: str, pairs: Sequence[tuple[RamNetOutput | OnnxOutput, OnnxOutput]], tolerance: float) -> Check:
        """Compare the logits of all pairs, but only the last pair's states, since steps update them in place."""
        reference, found = (_arrays(output.state) for output in pairs[-1])
        worst, replay.worst = replay.worst, 0.0
        return Check(
            name=name,
            batch=batch,
            logits=float(np.max([_error(a.logits.numpy(), b.logits.numpy()) for a, b in pairs])),
            state=float(np.max([_error(reference[key], found[key]) for key in reference])),
            addresses=worst,
            agreement=float(np.mean([a.logits.argmax(-1) == b.logits.argmax(-1) for a, b in pairs])),
            tolerance=tolerance,
        )

    near_wrap = max(0, max(c.slots for c in session.config.kinds) - 3)  # where addresses that move come back
    for batch, position in zip(BATCHES, (None, near_wrap, 2**31 - 5), strict=True):
        for tokens in LENGTHS:
            pair = prefill(tokens, None, OnnxState.zeros(model.config, batch))
            yield check(f"prefill of {tokens}", [pair], tolerance)
        state, bound = pair[0].state, pair[1].state
        if position is not None:
            state.position.copy_(position + torch.arange(batch))
            bound.tensors["position"] = state.position
        first = int(state.position[0])
        pair = prefill(LENGTHS[1], state, bound)
        yield check(f"prefill of {LENGTHS[1]} at {first}", [pair], tolerance)

        state, bound = pair[0].state, pair[1].state
        copied = bound.clone()
        steps, same = [], []
        for _ in range(STEPS):
            ids = torch.randint(model.config.vocab_size, (batch, 1), generator=generator)
            plain, slots = run_copying(session.graphs["decode"], ids, copied, layers)
            in_place = OnnxOutput(session.step(ids, bound), bound)
            expected = expect(ids, state, slots, in_place=True)
            state, copied = expected.state, plain.state
            steps.append((expected, in_place))
            same.append((plain, in_place))
        yield check(f"{STEPS} decode steps", steps, tolerance)
        yield check(f"{STEPS} steps, bound = copied", same, 0.0)


def _arrays(state: RamState | OnnxState) -> Mapping[str, NDArray[Any]]:
    return (OnnxState.of(state) if isinstance(state, RamState) else state).tensors


def _error(expected: NDArray[Any], found: NDArray[Any]) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(expected - found).max(initial=0) / max(1, np.abs(expected).max(initial=0)))
