"""Judges how well a model predicts: in bits a token of text, or of the float32 model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.quality import HeldOut, windows
from export.samples import Samples
from ramnet import RamNetForCausalLM

FILENAME = "judge.npz"
Logits = Callable[[NDArray[Any]], NDArray[Any]]  # of ids [T], from a fresh state: logits [T, V]


def save(path: Path, model: RamNetForCausalLM, text: HeldOut | None) -> None:
    """Write what is to be predicted, and how well ``model`` does. Without text, these are its own predictions."""
    import torch

    from ramnet.ops import using

    def logits(ids: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad(), using("cpu"):
            found: NDArray[Any] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        return found

    if text is None:
        samples = Samples.of(model)
        wanted: dict[str, NDArray[Any]] = {"ids": samples.ids[None], "logits": samples.logits[None]}
        bits = _bits(wanted, lambda _: samples.logits)
    else:
        count = windows(model)
        wanted = {"ids": text.ids[:count], "labels": text.labels[:count]}
        bits = _bits(wanted, logits)
    np.savez(path, allow_pickle=False, bits=np.float64(bits), **wanted)


def bits(path: Path, logits: Logits) -> tuple[float, float]:
    """Return the bits a token of a model, given by its ``logits``, and of the float32 model."""
    with np.load(path) as file:
        wanted = dict(file)
    return _bits(wanted, logits), float(wanted["bits"])


def _bits(wanted: Mapping[str, NDArray[Any]], logits: Logits) -> float:
    nats, count = 0.0, 0
    for i, ids in enumerate(wanted["ids"]):
        mine = _log_probabilities(logits(ids))
        if "labels" in wanted:
            labels = wanted["labels"][i]
            counted = labels >= 0
            nats -= float(np.take_along_axis(mine[counted], labels[counted, None], 1).sum())
            count += int(counted.sum())
        else:
            nats -= float((np.exp(_log_probabilities(wanted["logits"][i])) * mine).sum())
            count += len(ids)
    return nats / count / float(np.log(2))


def _log_probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    found = logits.astype(np.float64)
    found -= found.max(1, keepdims=True)
    found -= np.log(np.exp(found).sum(1, keepdims=True))
    return found
