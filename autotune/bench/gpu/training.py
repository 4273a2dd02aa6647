"""A training step on a GPU of RAM-Net and of the same model with gated linear attention, both with torch.compile."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.bench.gpu.peers import GatedLinearAttention, Peer
from autotune.bench.gpu.run import GpuRun, Make, finite
from autotune.bench.run import TUNED, Candidate, Table
from ramnet import RamNetConfig, RamNetForCausalLM

NAME = "training step"
GLA = "GLA, chunk_gla"
CHECKED_TOKENS = 64
# Loss and norm of the gradients in bfloat16 against the reference's, then the compiled step's loss against that of the
# same kernels without torch.compile: rounding may exchange addresses.
TOLERANCE, LOSS_TOLERANCE = 2e-2, 5e-3
# The numbers of micro-batches of a step: as few as memory allows, the same for both models.
PARTS = (2, 4, 8)


def step(run: GpuRun, preset: str = "340m", batch: int = 16, tokens: int = 4096) -> list[Table]:
    """Forward and cross-entropy in bfloat16 autocast, backward, AdamW in float32."""
    config = RamNetConfig.preset(preset)
    generator = torch.Generator(run.device).manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, tokens + 1), generator=generator, device=run.device)
    made: dict[str, nn.Module] = {}

    def ram_net(parts: int) -> Candidate:
        if TUNED not in made:
            made[TUNED] = _checked(run, config, ids)
        return _ram_net(run, made[TUNED], ids, parts)

    def peer(parts: int) -> Candidate:
        if GLA not in made:
            torch.manual_seed(0)
            with torch.device(run.device):
                made[GLA] = Peer(config, GatedLinearAttention, compiles=True)
        call = _step(made[GLA], ids, parts, run.device)
        finite(GLA, [call()])
        return call

    for parts in PARTS:
        what = f"{batch} sequences of {tokens} tokens in {parts} parts, bfloat16 autocast, torch.compile, AdamW"
        forms: dict[str, Make] = {TUNED: partial(ram_net, parts), GLA: partial(peer, parts)}
        table = run.table(f"{NAME} {preset}", what, forms, base=TUNED)
        if "out of memory" not in table.failed.values():
            break
    for row in table.rows:
        run.facts[f"{table.name}, {row.form}, tokens/s"] = batch * tokens / row.seconds
    return [table]


def _checked(run: GpuRun, config: RamNetConfig, ids: Tensor) -> RamNetForCausalLM:
    """Return the model. Raises ValueError if the kernels' loss or gradients on a short text are not the reference's."""
    torch.manual_seed(0)
    with torch.device(run.device):
        model = RamNetForCausalLM(config)
    short = ids[:2, : CHECKED_TOKENS + 1]
    expected = _loss_and_norm(model, short, run.device)
    with run.kernels[TUNED]():
        found = _loss_and_norm(model, short, run.device)
    if any(not abs(a - b) <= TOLERANCE * b for a, b in zip(found, expected, strict=True)):
        raise ValueError(f"RAM-Net is wrong: loss and norm of the gradients are {found}, the reference's {expected}")
    return model


def _ram_net(run: GpuRun, model: Any, ids: Tensor, parts: int) -> Candidate:
    """Return the compiled step. Raises ValueError if its loss differs from that without torch.compile."""
    import lowering

    with torch.no_grad(), run.kernels[TUNED]():
        losses = [float(_loss(model, part, run.device)) for part in ids.chunk(parts)]
    expected = sum(losses) / parts
    call = _step(lowering.compile(model, target=run.target), ids, parts, run.device)
    found = float(call())
    if not abs(found - expected) <= LOSS_TOLERANCE * expected:
        raise ValueError(f"RAM-Net is wrong: its loss is {found:.4f} compiled and {expected:.4f} eager")
    return call


def _loss(model: Any, ids: Tensor, device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16):
        logits = model(ids[:, :-1])[0]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _loss_and_norm(model: nn.Module, ids: Tensor, device: str) -> tuple[float, float]:
    loss = _loss(model, ids, device)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    norms = [x.float().norm() for x in gradients if x is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())


def _step(model: nn.Module, ids: Tensor, parts: int, device: str) -> Candidate:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    # Gradients may be left from a step that ran out of memory.
    optimizer.zero_grad(set_to_none=True)

    def step() -> Tensor:
        losses = []
        for part in ids.chunk(parts):
            loss = _loss(model, part, device) / parts
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    return step
