"""The whole model: prefill, decoding and a training step, on the eager reference and on kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.bench.run import DEFAULT, FLOOR, TUNED, Candidate, Run, Table, check, torch_threads, within
from ramnet import RamNetConfig, RamNetForCausalLM, RamState

EAGER, COMPILED = "eager reference", "lowering.compile"
FEW, MANY = "after 10 tokens", "after 100 000 tokens"
# Kernels round differently than the reference, and may choose the other of two addresses of equal weight.
TOLERANCE = 1e-2
IN_A_ROW = 4


class Decoding:
    """A call runs one token at batch 1, in place on a state that is kept between calls."""

    def __init__(self, model: Any, state: Any) -> None:
        self.model, self.state = model, state
        self.token = torch.ones(1, 1, dtype=torch.int64)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        out = self.model(self.token, self.state, in_place=True)
        self.state = out.state
        logits: Tensor = out.logits
        return logits


def make_model(preset: str) -> RamNetForCausalLM:
    """A model with random weights from a fixed seed."""
    torch.manual_seed(0)
    return RamNetForCausalLM(RamNetConfig.preset(preset))


def decode(run: Run, preset: str, threads: int) -> Table:
    """A token at batch 1. The bound is the time to read a token's weights, all but the embedding, once."""
    run.on_step(f"making the model {preset}")
    model = make_model(preset)
    forms: dict[str, Candidate] = {}
    with torch_threads(threads):
        expected = _decoded(Decoding(model, RamState.zeros(model.config, 1)))
        # A token in place runs on kernels and needs no torch.compile.
        for form, runs in _forms(run, model, compiles=False).items():
            run.on_step(f"decode {preset}: checking {form}")
            one = runs.around(Decoding(runs.model, RamState.zeros(model.config, 1)))
            check(form, [_decoded(one)], [expected], TOLERANCE)
            # Several tokens per call, as in decoding: the first one finds threads asleep and caches cold.
            forms[form] = partial(_decoded, one, IN_A_ROW)
    weights = sum(4 * x.numel() for name, x in model.named_parameters() if not name.startswith("embedding."))
    slow = {form: forms.pop(form) for form in (EAGER, DEFAULT) if form in forms}
    forms[FLOOR] = partial(run.dram(threads).read, IN_A_ROW * weights)
    what = f"batch 1, {weights / 1e6:.0f} MB of weights a token"
    return run.compare(f"decode {preset}", what, forms, slow, base=FLOOR, calls=IN_A_ROW, threads=threads)


def decode_late(run: Run, threads: int) -> Table | None:
    """Decoding after 100 000 tokens, against decoding after 10."""
    if TUNED not in run.kernels:
        run.notice("decode after 100 000 tokens left out: the reference takes minutes to read them")
        return None
    run.on_step("reading 100 000 tokens")
    model = make_model("tiny")
    ids = torch.randint(model.config.vocab_size, (1, 100_000), generator=torch.Generator().manual_seed(0))
    use = run.kernels[TUNED]
    with torch.no_grad(), use(), torch_threads(threads):
        early = model(ids[:, :10]).state
        late = RamState.zeros(model.config, 1)
        for chunk in ids.split(1000, dim=1):
            late = model(chunk, late).state
    forms = {name: within(use, partial(_decoded, Decoding(model, x), 16)) for name, x in ((FEW, early), (MANY, late))}
    what = f"batch 1, 16 tokens in turn, {TUNED}"
    return run.compare("decode tiny by position", what, forms, base=FEW, calls=16, threads=threads)


def prefill(run: Run, preset: str, batch: int, tokens: int, threads: int) -> Table:
    """The logits of a prompt."""
    model = make_model(preset)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def forward(runs: Any) -> Tensor:
        with torch.no_grad():
            return runs(ids).logits

    forms = {form: runs.around(partial(forward, runs.model)) for form, runs in _forms(run, model).items()}
    return _checked(run, f"prefill {preset}", f"batch {batch}, {tokens} tokens", forms, threads)


def training_step(run: Run, preset: str, batch: int, tokens: int, threads: int) -> Table:
    """Forward, cross-entropy and backward; no optimizer."""
    model = make_model(preset)
    ids = torch.randint(model.config.vocab_size, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))
    parameters = [x for x in model.parameters() if x.requires_grad]

    def step(runs: Any) -> Tensor:
        loss = F.cross_entropy(runs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([x.flatten() for x in gradients if x is not None])

    forms = {form: runs.around(partial(step, runs.model)) for form, runs in _forms(run, model).items()}
    return _checked(run, f"training step {preset}", f"batch {batch}, {tokens} tokens", forms, threads)


class _Form:
    """A model and what its calls run inside."""

    def __init__(self, model: Any, use: Any = None) -> None:
        self.model, self.use = model, use

    def around(self, call: Candidate) -> Candidate:
        return call if self.use is None else within(self.use, call)


def _forms(run: Run, model: RamNetForCausalLM, compiles: bool = True) -> dict[str, _Form]:
    forms = {EAGER: _Form(model)} | {name: _Form(model, use) for name, use in run.kernels.items()}
    if run.kernels and (not compiles or run.compiling("the model")):
        import lowering

        forms[COMPILED] = _Form(lowering.compile(model, target=run.target))
    return forms


def _checked(run: Run, name: str, what: str, forms: dict[str, Candidate], threads: int) -> Table:
    run.on_step(f"{name}: {EAGER}")
    with torch_threads(threads):
        expected = [forms[EAGER]()]
        for form, call in forms.items():
            if form != EAGER:
                run.on_step(f"{name}: checking {form}")
                check(form, [call()], expected, TOLERANCE)
    if TUNED not in forms:
        return run.compare(name, what, forms, base=EAGER, threads=threads)
    slow = {EAGER: forms.pop(EAGER)}
    return run.compare(name, what, forms, slow, base=TUNED, threads=threads)


def _decoded(call: Candidate, tokens: int = 3) -> Tensor:
    """The logits of the first tokens."""
    return torch.cat([call() for _ in range(tokens)])
