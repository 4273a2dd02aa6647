"""A trial builds, checks, times and judges a C library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the library needs tvm: pip install 'ramnet[tvm]'")

from autotune.deployment.space import CSpace
from autotune.deployment.stored import Stored
from autotune.deployment.trial import BASE, Request, Trials
from export.quality import HeldOut
from export.samples import Samples
from ramnet import RamNetForCausalLM
from schedules.deployment import Deployment
from tests.lowering.aot.c_library import TINY, model_of


@pytest.mark.parametrize("by", ["its own predictions", "text"])
def test_a_trial_builds_checks_times_and_judges(tmp_path: Path, by: str) -> None:
    model, ids = model_of(TINY), np.arange(192).reshape(2, 96) % 256
    text = None if by != "text" else HeldOut("held out", ids, np.where(ids % 5, ids + 1, -100))
    stored = Stored(model, text, tmp_path, CSpace(TINY, 1))
    base = Deployment(precision="float32", rows=4, lanes=16, tokens=4, threads=1, spins=0, block=128)
    stored.write(base)
    request = Request(config=TINY, folder=tmp_path, base=base, others={"it": base}, judge=True, rounds=1, seconds=0.0)
    trials = Trials()
    found = trials.run(request)
    assert found.times["it"].seconds > 0 and found.times[BASE].ratio == 1
    library = trials.open[base]
    block = [library.state() for _ in range(128)]
    assert library.step(block, np.zeros(128, np.int64)).shape == (128, 256)
    assert found.bits is not None
    if text is None:
        with np.errstate(all="raise"):
            samples = Samples.load(tmp_path / base.group).logits.astype(np.float64)
        p = np.exp(samples) / np.exp(samples).sum(1, keepdims=True)
        want = -(p * np.log2(p)).sum(1).mean()
    else:
        want = _bits(model, text)
    assert found.bits == pytest.approx((want, want), rel=1e-4)
    altered = Samples.load(tmp_path / base.group)
    altered.logits[0] += 1
    altered.save(tmp_path / base.group)
    assert trials.run(request).times, "a model that stays open is not checked again"
    with pytest.raises(ValueError, match="the logits are off by"):
        Trials().run(request)


def _bits(model: RamNetForCausalLM, text: HeldOut) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    with torch.no_grad():
        logits = model(torch.from_numpy(text.ids)).logits
    return float(cross_entropy(logits.flatten(0, 1), torch.from_numpy(text.labels).flatten())) / float(np.log(2))
